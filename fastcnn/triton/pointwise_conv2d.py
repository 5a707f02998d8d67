"""Pointwise convolution: [pixels, K] x [K, C] with the prologue on the pixels and the epilogue on the product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.ops.layout import conv_out_sizes, empty_nhwc
from fastcnn.ops.registry import Mutable
from fastcnn.triton.implicit_gemm import pixel_position
from fastcnn.triton.launch import PRECISION, cdiv, empty, given, nhwc, primitive, vector
from fastcnn.triton.product import matrix, product_tiles, store_output
from fastcnn.triton.prologue_epilogue import load_activated
from fastcnn.triton.reductions import merge_moments, moments_buffer

Pair = tuple[int, int]

INTEGERS = ["M", "k_vectors", "c_vectors", "x_vectors", "y_vectors", "residual_vectors", "H", "W", "P", "Q"]


@triton.jit
def pixel_offsets(first, rows, ld, H, W, P, Q, SH: tl.constexpr, SW: tl.constexpr):
    """Where output pixel first + rows lies in the strided input, in elements from the tile's base (see tile_base)."""
    if SH == 1 and SW == 1:
        return rows * ld
    else:
        image, p, q = pixel_position(first + rows, P, Q)
        return ((image * H + p * SH) * W + q * SW).to(tl.int64) * ld


@triton.jit
def tile_base(first, ld, SH: tl.constexpr, SW: tl.constexpr):
    """The 64-bit offset of a tile's first pixel; 0 where pixel_offsets counts from the tensor's start."""
    if SH == 1 and SW == 1:
        return first.to(tl.int64) * ld
    else:
        return tl.zeros([], tl.int64)


@triton.jit(do_not_specialize=INTEGERS)
def pointwise_fwd_kernel(
    x, weight, y, in_scale, in_shift, out_scale, out_shift, residual, moments,
    M, k_vectors, c_vectors, x_vectors, y_vectors, residual_vectors, H, W, P, Q,
    IN_ACT: tl.constexpr, OUT_ACT: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    VEC_K: tl.constexpr, VEC_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, c] = epilogue(sum_k prologue(x[m, k]) * weight[c, k])."""
    K = k_vectors * VEC_K
    C = c_vectors * VEC_C
    x_ld = x_vectors * VEC_K
    # All column tiles of a row tile in a row: x comes from memory once, the weights (some MB) stay in L2.
    tiles_n = tl.cdiv(C, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    first = tile_m * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    valid = rows < M - first
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < C

    x += tile_base(first, x_ld, SH, SW)
    x_offsets = pixel_offsets(first, rows, x_ld, H, W, P, Q, SH, SW)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_mask = k < K
        mask = valid[:, None] & k_mask[None, :]
        a = load_activated(x, x_offsets[:, None] + k[None, :], mask, in_scale, in_shift, k, k_mask, IN_ACT, False)
        b = tl.load(weight + columns[None, :] * K + k[:, None], mask=k_mask[:, None] & column_mask[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    store_output(
        acc, y, y_vectors * VEC_C, first, rows, valid, columns, column_mask, C, out_scale, out_shift, OUT_ACT,
        residual, residual_vectors * VEC_C, moments, tile_m, tl.cdiv(M, BLOCK_M), tile_n == 0,
    )  # fmt: skip


@primitive
def pointwise_fwd(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    out_act: int,
    residual: Tensor | None,
    stride: Pair,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """1x1 convolution with prologue and epilogue; weight [C, K, 1, 1]. Returns y, mean, var."""
    size = conv_out_sizes(x.shape[2:], (1, 1), stride, (0, 0))
    y = empty_nhwc(x.shape[0], weight.shape[0], *size, like=x)
    head, tail = (in_scale, in_shift, in_act), (out_scale, out_shift, out_act)
    return y, *pointwise_into(y, x, weight, *head, *tail, residual, stride, stats)


@primitive
def pointwise_into(
    out: Mutable,
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    out_act: int,
    residual: Tensor | None,
    stride: Pair,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    """pointwise_fwd with its output written to ``out``, a channel slice of an NHWC buffer. Returns mean, var."""
    x, x_ld = nhwc(x)
    residual, residual_ld = nhwc(residual)
    out_ld = given(out)
    (n, k, h, w), (_, c, p, q) = x.shape, out.shape
    m = n * p * q
    vec_k, vec_c = vector(k, x_ld), vector(c, out_ld, residual_ld)
    tiles = product_tiles(m, c, k, x.element_size(), vec_k)
    rows = cdiv(m, tiles.m)
    moments = moments_buffer(rows, c, x) if stats else None
    if m:
        pointwise_fwd_kernel[(rows * cdiv(c, tiles.n),)](
            x, matrix(weight, x), out, in_scale, in_shift, out_scale, out_shift, residual, moments,
            m, k // vec_k, c // vec_c, x_ld // vec_k, out_ld // vec_c, residual_ld // vec_c, h, w, p, q,
            in_act, out_act, *stride, vec_k, vec_c, PRECISION, tiles.m, tiles.n, tiles.k,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return merge_moments(moments, rows, c) if stats else (empty(x), empty(x))


def zeros_nhwc(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An NHWC tensor of zeros in x's shape."""
    return empty_nhwc(*x.shape, like=x, dtype=dtype).zero_()
