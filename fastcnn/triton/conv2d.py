"""The general convolution as an implicit product: no column buffer, the prologue on the gathered pixels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastcnn.ops.layout import conv_out_sizes, empty_nhwc
from fastcnn.ops.registry import Mutable
from fastcnn.triton.implicit_gemm import bundled, gathered, inside, pixel_position, split_column, tap_matrices
from fastcnn.triton.launch import PRECISION, cdiv, empty, given, nhwc, primitive, vector
from fastcnn.triton.product import product_tiles, store_output
from fastcnn.triton.prologue_epilogue import load_activated
from fastcnn.triton.reductions import merge_moments, moments_buffer

Pair = tuple[int, int]

INTEGERS = ["M", "groups", "k_vectors", "c_vectors", "x_vectors", "y_vectors", "residual_vectors", "H", "W", "P", "Q"]


@triton.jit(do_not_specialize=INTEGERS)
def conv2d_fwd_kernel(
    x, weight, y, in_scale, in_shift, out_scale, out_shift, residual, moments,
    M, groups, k_vectors, c_vectors, x_vectors, y_vectors, residual_vectors, H, W, P, Q,
    IN_ACT: tl.constexpr, OUT_ACT: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    VEC_K: tl.constexpr, VEC_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, c] = epilogue(sum over r, s, k of prologue(x[p SH - PH + r DH, q SW - PW + s DW, k]) * weight[c, r, s, k]).

    Pixel m is p, q of its image; c and k are of the program's group.
    """
    K = k_vectors * VEC_K
    C = c_vectors * VEC_C
    x_ld = x_vectors * VEC_K
    length = R * S * K
    # All groups and column tiles of a row tile in a row: they read the same pixels.
    tiles_n = tl.cdiv(C, BLOCK_N)
    tile_m = tl.program_id(0) // (groups * tiles_n)
    group = tl.program_id(0) // tiles_n % groups
    tile_n = tl.program_id(0) % tiles_n
    first = tile_m * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    valid = rows < M - first
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < C

    image, p, q = pixel_position(first + rows, P, Q)
    h = p * SH - PH
    w = q * SW - PW
    pixels = (image * H + h) * W + w
    weight += (group * C + columns[None, :]) * length
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, length, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        live = column < length
        r, s, k = split_column(column, K, S)
        channels = group * K + k
        mask = inside(h, w, r * DH, s * DW, H, W) & valid[:, None] & live[None, :]
        offsets = gathered(pixels, r * DH * W + s * DW, x_ld, channels)
        a = load_activated(x, offsets, mask, in_scale, in_shift, channels, live, IN_ACT, True)
        b = tl.load(weight + column[:, None], mask=live[:, None] & column_mask[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    store_output(
        acc, y, y_vectors * VEC_C, first, rows, valid, group * C + columns, column_mask, groups * C,
        out_scale, out_shift, OUT_ACT, residual, residual_vectors * VEC_C,
        moments, tile_m, tl.cdiv(M, BLOCK_M), (group == 0) & (tile_n == 0),
    )  # fmt: skip


@primitive
def conv2d_fwd(
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
    padding: Pair,
    dilation: Pair,
    groups: int,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Any convolution with prologue and epilogue; weight [C, K / groups, R, S]. Returns y, mean, var."""
    c, _, *kernel = weight.shape
    size = conv_out_sizes(x.shape[2:], kernel, stride, padding, dilation)
    y = empty_nhwc(x.shape[0], c, *size, like=x)
    mean, var = conv2d_into(
        y, x, weight, in_scale, in_shift, in_act, out_scale, out_shift, out_act, residual,
        stride, padding, dilation, groups, stats,
    )  # fmt: skip
    return y, mean, var


@primitive
def conv2d_into(
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
    padding: Pair,
    dilation: Pair,
    groups: int,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    """conv2d_fwd with its output written to ``out``, a channel slice of an NHWC buffer. Returns mean, var.

    Every group has its own tiles; groups of few channels are bundled (see implicit_gemm.bundled).
    """
    x, x_ld = nhwc(x)
    residual, residual_ld = nhwc(residual)
    out_ld = given(out)
    (n, _, h, w), (_, out_channels, p, q), (r, s) = x.shape, out.shape, weight.shape[2:]
    bundle = bundled(weight, groups)
    taps = tap_matrices(weight, groups, bundle, x)
    groups, c, _, _, k = taps.shape
    m = n * p * q
    vec_k, vec_c = vector(k, x_ld), vector(c, out_ld, residual_ld)
    tiles = product_tiles(m, c, r * s * k, x.element_size(), vec_k, groups, gathered=True)
    rows = cdiv(m, tiles.m)
    moments = moments_buffer(rows, out_channels, x) if stats else None
    if m:
        conv2d_fwd_kernel[(rows * groups * cdiv(c, tiles.n),)](
            x, taps, out, in_scale, in_shift, out_scale, out_shift, residual, moments,
            m, groups, k // vec_k, c // vec_c, x_ld // vec_k, out_ld // vec_c, residual_ld // vec_c, h, w, p, q,
            in_act, out_act, r, s, *stride, *padding, *dilation, vec_k, vec_c, PRECISION, tiles.m, tiles.n, tiles.k,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return merge_moments(moments, rows, out_channels) if stats else (empty(x), empty(x))
