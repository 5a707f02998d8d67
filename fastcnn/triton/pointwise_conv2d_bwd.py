"""Gradients of the pointwise convolution: a product for the input, and one split over the pixels for the weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.ops.layout import empty_nhwc
from fastcnn.ops.registry import Mutable
from fastcnn.triton.launch import PRECISION, cdiv, empty, given, nhwc, primitive, vector
from fastcnn.triton.pointwise_conv2d import pixel_offsets, tile_base, zeros_nhwc
from fastcnn.triton.product import (
    input_gradient_tiles,
    matrix,
    pixel_splits,
    store_input_gradient,
    sums_buffer,
    weight_gradient_tiles,
)
from fastcnn.triton.prologue_epilogue import load_activated, load_channel_gradient
from fastcnn.triton.reductions import sum_rows

Pair = tuple[int, int]

INTEGERS = ["M", "k_vectors", "c_vectors", "grad_vectors", "y_vectors", "x_vectors", "H", "W", "P", "Q"]


@triton.jit(do_not_specialize=["dx_vectors", *INTEGERS])
def pointwise_dgrad_kernel(
    grad, y, y_scale, y_shift, coef, weight, x, x_scale, x_shift, x_mean, dx, sums, residual,
    dx_vectors, M, k_vectors, c_vectors, grad_vectors, y_vectors, x_vectors, H, W, P, Q,
    Y_ACT: tl.constexpr, X_ACT: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    VEC_K: tl.constexpr, VEC_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """dx[m, k] = x_act'(x[m, k]) * sum_c dy[m, c] * weight[c, k], and the tile's share of sums (rows [tiles, 2, K]).

    With ADDS dx[m, k] += x_scale[k] * that.
    """
    K = k_vectors * VEC_K
    C = c_vectors * VEC_C
    grad_ld = grad_vectors * VEC_C
    y_ld = y_vectors * VEC_C
    x_ld = x_vectors * VEC_K
    dx_ld = dx_vectors * VEC_K
    tiles_n = tl.cdiv(K, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    first = tile_m * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    valid = rows < M - first
    columns = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < K

    grad += first.to(tl.int64) * grad_ld
    if y is not None:
        y += first.to(tl.int64) * y_ld
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c0 in range(0, C, BLOCK_K):
        c = c0 + tl.arange(0, BLOCK_K)
        c_mask = c < C
        mask = valid[:, None] & c_mask[None, :]
        dy = load_channel_gradient(
            grad, rows[:, None] * grad_ld + c[None, :], y, rows[:, None] * y_ld + c[None, :],
            y_scale, y_shift, Y_ACT, coef, mask, c, c_mask, C,
        ).to(weight.dtype.element_ty)  # fmt: skip
        b = tl.load(weight + c[:, None] * K + columns[None, :], mask=c_mask[:, None] & column_mask[None, :], other=0.0)
        acc = tl.dot(dy, b, acc, input_precision=PRECISION)

    mask = valid[:, None] & column_mask[None, :]
    x_offsets = pixel_offsets(first, rows, x_ld, H, W, P, Q, SH, SW)[:, None] + columns[None, :]
    dx_offsets = pixel_offsets(first, rows, dx_ld, H, W, P, Q, SH, SW)[:, None] + columns[None, :]
    if residual is not None:
        residual += tile_base(first, dx_ld, SH, SW)
    store_input_gradient(
        acc, x + tile_base(first, x_ld, SH, SW), x_offsets, dx + tile_base(first, dx_ld, SH, SW), dx_offsets, mask,
        columns, column_mask, K, x_scale, x_shift, X_ACT, x_mean, sums, tile_m, residual, ADDS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows_per_split", *INTEGERS])
def pointwise_wgrad_kernel(
    grad, y, y_scale, y_shift, coef, x, x_scale, x_shift, dw,
    rows_per_split, M, k_vectors, c_vectors, grad_vectors, y_vectors, x_vectors, H, W, P, Q,
    Y_ACT: tl.constexpr, X_ACT: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    VEC_K: tl.constexpr, VEC_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dw[split, c, k] = sum over the split's pixels of dy[m, c] * prologue(x[m, k])."""
    K = k_vectors * VEC_K
    C = c_vectors * VEC_C
    grad_ld = grad_vectors * VEC_C
    y_ld = y_vectors * VEC_C
    x_ld = x_vectors * VEC_K
    # The tiles of one split run side by side: they read the same pixels.
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tiles_k * tl.cdiv(C, BLOCK_C)
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    c = tile // tiles_k * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    c_mask = c < C
    k_mask = k < K
    start = split * rows_per_split
    rows = tl.arange(0, BLOCK_M)

    acc = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for done in range(0, rows_per_split, BLOCK_M):
        first = start + done
        valid = rows < M - first
        mask = valid[:, None] & c_mask[None, :]
        grad_offsets = first.to(tl.int64) * grad_ld + rows[:, None] * grad_ld + c[None, :]
        y_offsets = first.to(tl.int64) * y_ld + rows[:, None] * y_ld + c[None, :]
        dy = load_channel_gradient(
            grad, grad_offsets, y, y_offsets, y_scale, y_shift, Y_ACT, coef, mask, c, c_mask, C
        ).to(x.dtype.element_ty)
        x_offsets = tile_base(first, x_ld, SH, SW) + pixel_offsets(first, rows, x_ld, H, W, P, Q, SH, SW)
        mask = valid[:, None] & k_mask[None, :]
        a = load_activated(x, x_offsets[:, None] + k[None, :], mask, x_scale, x_shift, k, k_mask, X_ACT, False)
        acc = tl.dot(tl.trans(dy), a, acc, input_precision=PRECISION)
    dw += split.to(tl.int64) * C * K
    tl.store(dw + c[:, None] * K + k[None, :], acc, mask=c_mask[:, None] & k_mask[None, :])


@primitive
def pointwise_bwd(
    grad: Tensor,
    y: Tensor | None,
    y_scale: Tensor | None,
    y_shift: Tensor | None,
    y_act: int,
    coef: Tensor | None,
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_act: int,
    x_mean: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    stride: Pair,
    need_dx: bool,
    need_dw: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of pointwise_fwd. Returns dx, dw [C, K, 1, 1], sums."""
    upstream, source = (grad, y, y_scale, y_shift, y_act, coef), (x, x_scale, x_shift, x_act, x_mean)
    if not need_dx:
        return grad.new_empty(0), *_backward(upstream, source, weight, stride, None, None, need_dw, False)
    fused = None if residual is None or need_sums else residual.contiguous(memory_format=torch.channels_last)
    if max(stride) == 1:
        dx = empty_nhwc(*x.shape, like=grad)
    else:
        dx = zeros_nhwc(x, grad.dtype) if fused is None else fused.clone(memory_format=torch.channels_last)
    dw, sums = _backward(upstream, source, weight, stride, dx, fused, need_dw, need_sums)
    if need_sums and residual is not None:
        dx.add_(residual)
    return dx, dw, sums


@primitive
def pointwise_bwd_into(
    dx: Mutable,
    grad: Tensor,
    y: Tensor | None,
    y_scale: Tensor | None,
    y_shift: Tensor | None,
    y_act: int,
    coef: Tensor | None,
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_act: int,
    x_mean: Tensor | None,
    weight: Tensor,
    need_dw: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    """pointwise_bwd of stride 1 that adds x_scale * dx to ``dx``, a channel slice of an NHWC buffer. Returns dw, sums."""
    upstream, source = (grad, y, y_scale, y_shift, y_act, coef), (x, x_scale, x_shift, x_act, x_mean)
    return _backward(upstream, source, weight, (1, 1), dx, None, need_dw, need_sums, adds=True)


def _backward(
    upstream: tuple,
    source: tuple,
    weight: Tensor,
    stride: Pair,
    dx: Tensor | None,
    residual: Tensor | None,
    need_dw: bool,
    need_sums: bool,
    adds: bool = False,
) -> tuple[Tensor, Tensor]:
    """dw and sums; dx is written (or added to) where it is not None, and the residual lies like it."""
    grad, y, y_scale, y_shift, y_act, coef = upstream
    x, x_scale, x_shift, x_act, x_mean = source
    grad, grad_ld = nhwc(grad)
    y, y_ld = nhwc(y)
    x, x_ld = nhwc(x)
    (n, k, h, w), (_, c, p, q) = x.shape, grad.shape
    m, dx_ld = n * p * q, k if dx is None else given(dx)
    vec_k, vec_c = vector(k, x_ld, dx_ld), vector(c, grad_ld, y_ld)
    operands = (grad, y, y_scale, y_shift, coef)
    sizes = (m, k // vec_k, c // vec_c, grad_ld // vec_c, y_ld // vec_c, x_ld // vec_k, h, w, p, q)
    constants = (y_act, x_act, *stride, vec_k, vec_c, PRECISION)
    dw, sums = empty(x), empty(x)
    if dx is not None:
        tiles = input_gradient_tiles(m, k, c, x.element_size(), vec_c, x_act)
        rows = cdiv(m, tiles.m)
        partials = sums_buffer(rows, k, x) if need_sums else None
        if m:
            pointwise_dgrad_kernel[(rows * cdiv(k, tiles.n),)](
                *operands, matrix(weight, x), x, x_scale, x_shift, x_mean, dx, partials, residual, dx_ld // vec_k,
                *sizes, *constants, tiles.m, tiles.n, tiles.k, adds, num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
        if need_sums:
            sums = sum_rows(partials)
    if need_dw:
        tile = weight_gradient_tiles(c, k, x.element_size(), min(vec_k, vec_c))
        tiles = cdiv(c, tile.n) * cdiv(k, tile.k)
        splits, per_split = pixel_splits(m, tiles, tile.m)
        partials = torch.empty((splits, c, k, 1, 1), dtype=torch.float32, device=x.device)
        pointwise_wgrad_kernel[(splits * tiles,)](
            *operands, x, x_scale, x_shift, partials, per_split, *sizes, *constants, tile.n, tile.k, tile.m,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        dw = sum_rows(partials)
    return dw, sums
