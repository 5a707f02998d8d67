"""Gradients of the general convolution as implicit products, for the input and for the weight."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.ops.layout import empty_nhwc
from fastcnn.triton.implicit_gemm import (
    bundled,
    gathered,
    inside,
    pixel_position,
    split_column,
    tap_matrices,
    weight_of_taps,
)
from fastcnn.triton.launch import PRECISION, cdiv, empty, nhwc, primitive, vector
from fastcnn.triton.product import (
    input_gradient_tiles,
    pixel_splits,
    store_input_gradient,
    sums_buffer,
    weight_gradient_tiles,
)
from fastcnn.triton.prologue_epilogue import load_activated, load_channel_gradient
from fastcnn.triton.reductions import sum_rows

Pair = tuple[int, int]

INTEGERS = ["images", "groups", "k_vectors", "c_vectors", "grad_vectors", "y_vectors", "x_vectors", "H", "W", "P", "Q"]


@triton.constexpr_function
def tap_step(stride, dilation):
    """How many taps apart are two that an input pixel is read through: r DH = h + PH - p SH."""
    return stride // math.gcd(stride, dilation)


@triton.jit
def phase_taps(phase, TAPS: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr):
    """The taps first, first + step, ... through which the positions phase, phase + STRIDE, ... are read, along one axis.

    Returns first, the number of taps, and the output position that reads position phase through the first.
    """
    STEP: tl.constexpr = tap_step(STRIDE, DILATION)
    first = TAPS
    for tap in tl.static_range(min(STEP, TAPS)):
        first = tl.where((phase + PADDING - tap * DILATION) % STRIDE == 0, tap, first)
    return first, tl.cdiv(TAPS - first, STEP), (phase + PADDING - first * DILATION) // STRIDE


@triton.jit(do_not_specialize=INTEGERS)
def conv2d_dgrad_kernel(
    grad, y, y_scale, y_shift, coef, weight, x, x_scale, x_shift, x_mean, dx, sums, residual,
    images, groups, k_vectors, c_vectors, grad_vectors, y_vectors, x_vectors, H, W, P, Q,
    Y_ACT: tl.constexpr, X_ACT: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    VEC_K: tl.constexpr, VEC_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx[h, w, k] = x_act'(x[h, w, k]) * sum over r, s, c of dy[p, q, c] * weight[c, r, s, k], and its tile's sums.

    p SH = h + PH - r DH, q SW = w + PW - s DW. A strided convolution reads input pixels of one phase (h mod SH, w mod
    SW) through the same taps: a tile has pixels of one phase, and no product with a tap that reads none of them.
    """
    K = k_vectors * VEC_K
    C = c_vectors * VEC_C
    grad_ld = grad_vectors * VEC_C
    y_ld = y_vectors * VEC_C
    # All phases, groups and column tiles of a row tile in a row: they read the same gradients.
    tiles_n = tl.cdiv(K, BLOCK_N)
    tile = tl.program_id(0) // (groups * tiles_n)
    group = tl.program_id(0) // tiles_n % groups
    phase_h = tile % (SH * SW) // SW
    phase_w = tile % SW
    phase_H = tl.cdiv(H - phase_h, SH)
    phase_W = tl.cdiv(W - phase_w, SW)
    pixel = tile // (SH * SW) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = pixel < images * phase_H * phase_W
    columns = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < K

    # A phase has no pixels where the stride exceeds the image: nothing divides by their number.
    image, h, w = pixel_position(pixel, tl.maximum(phase_H, 1), tl.maximum(phase_W, 1))
    first_r, taps_r, p = phase_taps(phase_h, R, SH, PH, DH)
    first_s, taps_s, q = phase_taps(phase_w, S, SW, PW, DW)
    p += h
    q += w
    pixels = (image * P + p) * Q + q
    length = taps_r * taps_s * C
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, length, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        live = row < length
        i, j, c = split_column(row, C, tl.maximum(taps_s, 1))
        channels = group * C + c
        # The next tap reads the pixel from an earlier output.
        dp = -i * (DH * tap_step(SH, DH) // SH)
        dq = -j * (DW * tap_step(SW, DW) // SW)
        mask = inside(p, q, dp, dq, P, Q) & valid[:, None] & live[None, :]
        distances = dp * Q + dq
        dy = load_channel_gradient(
            grad, gathered(pixels, distances, grad_ld, channels), y, gathered(pixels, distances, y_ld, channels),
            y_scale, y_shift, Y_ACT, coef, mask, channels, live, groups * C,
        ).to(weight.dtype.element_ty)  # fmt: skip
        taps = (first_r + i * tap_step(SH, DH)) * S + first_s + j * tap_step(SW, DW)
        b = tl.load(
            weight + ((channels * (R * S) + taps) * K)[:, None] + columns[None, :],
            mask=live[:, None] & column_mask[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(dy, b, acc, input_precision=PRECISION)

    columns += group * K
    h = h * SH + phase_h
    w = w * SW + phase_w
    pixels = ((image * H + h) * W + w).to(tl.int64)[:, None]
    x_offsets = pixels * (x_vectors * VEC_K) + columns[None, :]
    dx_offsets = pixels * (groups * K) + columns[None, :]
    store_input_gradient(
        acc, x, x_offsets, dx, dx_offsets, valid[:, None] & column_mask[None, :], columns, column_mask, groups * K,
        x_scale, x_shift, X_ACT, x_mean, sums, tile, residual, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows_per_split", *INTEGERS])
def conv2d_wgrad_kernel(
    grad, y, y_scale, y_shift, coef, x, x_scale, x_shift, dw,
    rows_per_split, images, groups, k_vectors, c_vectors, grad_vectors, y_vectors, x_vectors, H, W, P, Q,
    Y_ACT: tl.constexpr, X_ACT: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    VEC_K: tl.constexpr, VEC_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dw[split, c, r, s, k] = sum over the split's pixels of dy[p, q, c] * prologue(x[h, w, k]), as in the forward."""
    K = k_vectors * VEC_K
    C = c_vectors * VEC_C
    grad_ld = grad_vectors * VEC_C
    y_ld = y_vectors * VEC_C
    x_ld = x_vectors * VEC_K
    length = R * S * K
    # The tiles of one split run side by side: they read the same pixels.
    tiles_k = tl.cdiv(length, BLOCK_K)
    tiles = tiles_k * tl.cdiv(C, BLOCK_C)
    split = tl.program_id(0) // (tiles * groups)
    group = tl.program_id(0) // tiles % groups
    tile = tl.program_id(0) % tiles
    c = tile // tiles_k * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    c += group * C
    column = tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    live = column < length
    r, s, k = split_column(column, K, S)
    k += group * K
    distances = r * DH * W + s * DW
    M = images * P * Q
    rows = tl.arange(0, BLOCK_M)

    acc = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for done in range(0, rows_per_split, BLOCK_M):
        first = split * rows_per_split + done
        valid = rows < M - first
        mask = valid[:, None] & c_mask[None, :]
        grad_offsets = first.to(tl.int64) * grad_ld + rows[:, None] * grad_ld + c[None, :]
        y_offsets = first.to(tl.int64) * y_ld + rows[:, None] * y_ld + c[None, :]
        dy = load_channel_gradient(
            grad, grad_offsets, y, y_offsets, y_scale, y_shift, Y_ACT, coef, mask, c, c_mask, groups * C
        ).to(x.dtype.element_ty)
        image, p, q = pixel_position(first + rows, P, Q)
        h = p * SH - PH
        w = q * SW - PW
        mask = inside(h, w, r * DH, s * DW, H, W) & valid[:, None] & live[None, :]
        x_offsets = gathered((image * H + h) * W + w, distances, x_ld, k)
        a = load_activated(x, x_offsets, mask, x_scale, x_shift, k, live, X_ACT, True)
        acc = tl.dot(tl.trans(dy), a, acc, input_precision=PRECISION)
    dw += split.to(tl.int64) * (groups * C) * length
    tl.store(dw + c[:, None] * length + column[None, :], acc, mask=c_mask[:, None] & live[None, :])


@primitive
def conv2d_bwd(
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
    padding: Pair,
    dilation: Pair,
    groups: int,
    need_dx: bool,
    need_dw: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of conv2d_fwd. Returns dx, dw [C, K / groups, R, S], sums."""
    grad, grad_ld = nhwc(grad)
    y, y_ld = nhwc(y)
    x, x_ld = nhwc(x)
    (n, channels, h, w), (_, _, p, q), (r, s) = x.shape, grad.shape, weight.shape[2:]
    bundle = bundled(weight, groups)
    taps = tap_matrices(weight, groups, bundle, x)
    groups, c, _, _, k = taps.shape
    vec_k, vec_c = vector(k, x_ld), vector(c, grad_ld, y_ld)
    upstream = (grad, y, y_scale, y_shift, coef)
    sizes = (n, groups, k // vec_k, c // vec_c, grad_ld // vec_c, y_ld // vec_c, x_ld // vec_k, h, w, p, q)
    constants = (y_act, x_act, r, s, *stride, *padding, *dilation, vec_k, vec_c, PRECISION)
    dx, dw, sums = grad.new_empty(0), empty(x), empty(x)
    if need_dx:
        dx = empty_nhwc(n, channels, h, w, like=grad)
        fused = None if residual is None or need_sums else residual.contiguous(memory_format=torch.channels_last)
        phases = stride[0] * stride[1]
        pixels = n * cdiv(h, stride[0]) * cdiv(w, stride[1])
        length = cdiv(r * s * c, phases)
        tiles = input_gradient_tiles(pixels, k, length, x.element_size(), vec_c, x_act, groups * phases, True)
        rows = cdiv(pixels, tiles.m) * phases
        partials = sums_buffer(rows, channels, x) if need_sums else None
        if rows:
            conv2d_dgrad_kernel[(rows * groups * cdiv(k, tiles.n),)](
                *upstream, taps, x, x_scale, x_shift, x_mean, dx, partials, fused, *sizes, *constants,
                tiles.m, tiles.n, tiles.k, num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
        if need_sums:
            sums = sum_rows(partials)
            dx = dx if residual is None else dx.add_(residual)
    if need_dw:
        tile = weight_gradient_tiles(c, r * s * k, x.element_size(), min(vec_k, vec_c), True)
        tiles = groups * cdiv(c, tile.n) * cdiv(r * s * k, tile.k)
        splits, per_split = pixel_splits(n * p * q, tiles, tile.m)
        partials = torch.empty((splits, *taps.shape), dtype=torch.float32, device=x.device)
        conv2d_wgrad_kernel[(splits * tiles,)](
            *upstream, x, x_scale, x_shift, partials, per_split, *sizes, *constants, tile.n, tile.k, tile.m,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        dw = weight_of_taps(sum_rows(partials), bundle).contiguous()
    return dx, dw, sums
