"""Depthwise-separable convolution: the depthwise tile goes from registers into the product, never to memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastcnn.ops.layout import conv_out_sizes, empty_nhwc
from fastcnn.triton.activations import activate
from fastcnn.triton.depthwise_conv2d import depthwise_fwd, taps_of
from fastcnn.triton.launch import PRECISION, cdiv, empty, nhwc, pow2, primitive, vector
from fastcnn.triton.pointwise_conv2d import pointwise_fwd
from fastcnn.triton.product import matrix
from fastcnn.triton.prologue_epilogue import epilogue, load_affine, per_channel
from fastcnn.triton.reductions import merge_moments, moments_buffer, tile_moments
from fastcnn.triton.stencil import group_origin, stencil, tile_grid, zeros

Pair = tuple[int, int]

INTEGERS = ["images", "k_vectors", "x_vectors", "c_vectors", "residual_vectors", "H", "W", "P", "Q"]

# One program makes all output channels of its pixels, or the stencil would be computed once per column tile: 256
# columns of 64 or 128 pixels are what the registers hold. Beyond (Xception's 728) the two kernels do less work.
MAX_CHANNELS = 256


@triton.jit
def interleave(a0, a1, a2, a3):
    """Four tiles [groups, channels] as one [groups * 4, channels]: row 4 g + j is row g of tile j."""
    stacked = tl.join(tl.join(a0, a1), tl.join(a2, a3))
    return tl.reshape(tl.permute(stacked, (0, 3, 2, 1)), (a0.shape[0] * 4, a0.shape[1]))


@triton.jit
def middle(
    x, ld, h0, w0, k, k_mask, K, H, W, in_scale, in_shift, mid_scale, mid_shift, taps,
    IN_ACT: tl.constexpr, MID_ACT: tl.constexpr, MULTIPLIER: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of channels of the normalised, activated depthwise output, [4 GROUPS, BLOCK_K] float32."""
    channels = k // MULTIPLIER
    if in_scale is not None:
        in_scale = per_channel(in_scale, channels, k_mask)
    if in_shift is not None:
        in_shift = per_channel(in_shift, channels, k_mask)
    mid = zeros(4, GROUPS, BLOCK_K)
    mid = stencil(
        mid, x, ld, h0, w0, channels, k_mask, H, W, in_scale, in_shift, taps, k, K,
        IN_ACT, R, S, SH, SW, DH, DW, 1, 4, False,
    )  # fmt: skip
    return activate(load_affine(interleave(mid[0], mid[1], mid[2], mid[3]), mid_scale, mid_shift, k, k_mask), MID_ACT)


@triton.jit(do_not_specialize=INTEGERS)
def separable_fwd_kernel(
    x, taps, weight, y, in_scale, in_shift, mid_scale, mid_shift, out_scale, out_shift, residual, moments,
    images, k_vectors, x_vectors, c_vectors, residual_vectors, H, W, P, Q,
    IN_ACT: tl.constexpr, MID_ACT: tl.constexpr, OUT_ACT: tl.constexpr, MULTIPLIER: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, VEC_K: tl.constexpr, VEC_C: tl.constexpr, PRECISION: tl.constexpr,
    TILE_P: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = epilogue(mid @ weight^T), mid[pixel, k] = mid_act(mid_scale * stencil(prologue(x)) + mid_shift).

    A program makes TILE_P x 4 TILE_Q pixels of one image and all C <= BLOCK_N channels; per block of k the stencil of
    those pixels becomes the left operand.
    """
    K = k_vectors * VEC_K
    C = c_vectors * VEC_C
    x_ld = x_vectors * VEC_K
    residual_ld = residual_vectors * VEC_C
    tiles_q = tl.cdiv(Q, 4 * TILE_Q)
    tiles = tl.cdiv(P, TILE_P) * tiles_q
    tile = tl.program_id(0)
    image = (tile // tiles).to(tl.int64)
    p0, q0 = group_origin(tile % tiles, tiles_q, 1, 4, TILE_P, TILE_Q)
    x += image * H * W * x_ld
    columns = tl.arange(0, BLOCK_N)
    column_mask = columns < C

    acc = tl.zeros([TILE_P * TILE_Q * 4, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_mask = k < K
        b = tl.load(weight + columns[None, :] * K + k[:, None], mask=k_mask[:, None] & column_mask[None, :], other=0.0)
        a = middle(
            x, x_ld, p0 * SH - PH, q0 * SW - PW, k, k_mask, K, H, W, in_scale, in_shift, mid_scale, mid_shift, taps,
            IN_ACT, MID_ACT, MULTIPLIER, R, S, SH, SW, DH, DW, TILE_P * TILE_Q, BLOCK_K,
        ).to(x.dtype.element_ty)  # fmt: skip
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    row = tl.arange(0, TILE_P * TILE_Q * 4)
    group = row // 4
    p = tile % tiles // tiles_q * TILE_P + group // TILE_Q
    q = (tile % tiles % tiles_q * TILE_Q + group % TILE_Q) * 4 + row % 4
    valid = (p < P) & (q < Q)
    pixel = p * Q + q
    mask = valid[:, None] & column_mask[None, :]
    if residual is not None:
        residual += image * P * Q * residual_ld
    residual_offsets = (pixel * residual_ld)[:, None] + columns[None, :]
    if out_scale is not None:
        out_scale = per_channel(out_scale, columns, column_mask)
    if out_shift is not None:
        out_shift = per_channel(out_shift, columns, column_mask)
    acc = epilogue(acc, out_scale, out_shift, OUT_ACT, residual, residual_offsets, mask)
    y += image * P * Q * C
    offsets = (pixel * C)[:, None] + columns[None, :]
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=mask)
    if moments is not None:
        tile_moments(y, offsets, mask, valid, moments, tile, images * tiles, columns, column_mask, C, True)


def is_fused(taps: int, c: int) -> bool:
    """Whether one kernel makes the whole separable convolution.

    Up to MAX_CHANNELS, and up to 5 x 5: a stencil as long as a 7 x 7 costs more than the traffic that it saves, because
    without the rows of a larger tile it reads every input 7 x 10 / 4 times from L1.
    """
    return taps <= 25 and c <= MAX_CHANNELS


def _fused(x, dw_weight, pw_weight, head, middle, tail, residual, stride, padding, dilation, stats):
    """One launch; head, middle and tail are (scale, shift, act)."""
    x, x_ld = nhwc(x)
    residual, residual_ld = nhwc(residual)
    (n, channels, h, w), (k, _, r, s), c = x.shape, dw_weight.shape, pw_weight.shape[0]
    p, q = conv_out_sizes((h, w), (r, s), stride, padding, dilation)
    y = empty_nhwc(n, c, p, q, like=x)
    block_n = pow2(c, 16, MAX_CHANNELS)
    # 128 pixels, and 64 beside 256 channels: 64 accumulators a thread with 8 warps.
    tile_p, tile_q, down, across = tile_grid(p, q, 1, 4, 16 if block_n > 128 else 32)
    tile_p = max(tile_p, 4 // tile_q)  # at least 16 rows for the product
    down = cdiv(p, tile_p)
    # 64 bytes of channels a pixel: 4 (float32: 2) a thread, as in the depthwise kernels. No software pipeline: it would
    # give each of the stencil's loads its own buffers in shared memory (160 KB); blocks hide each other's latency.
    block_k = pow2(k, 16, 64 // x.element_size())
    rows = n * down * across
    moments = moments_buffer(rows, c, x) if stats else None
    vec_k, vec_c = vector(k, channels, x_ld), vector(c, residual_ld)
    if rows:
        separable_fwd_kernel[(rows,)](
            x, taps_of(dw_weight, x), matrix(pw_weight, x), y, *head[:2], *middle[:2], *tail[:2], residual, moments,
            n, k // vec_k, x_ld // vec_k, c // vec_c, residual_ld // vec_c, h, w, p, q,
            head[2], middle[2], tail[2], k // channels, r, s, *stride, *padding, *dilation, vec_k, vec_c, PRECISION,
            tile_p, tile_q, block_n, block_k,
            num_warps=8 if block_n >= 64 else 4, num_stages=1,
        )  # fmt: skip
    return (y, *merge_moments(moments, rows, c)) if stats else (y, empty(x), empty(x))


@primitive
def separable_fwd(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    mid_scale: Tensor | None,
    mid_shift: Tensor | None,
    mid_act: int,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    out_act: int,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise, scale-shift-activation, pointwise, scale-shift-activation, residual. Returns y, mean, var."""
    head, middle, tail = (in_scale, in_shift, in_act), (mid_scale, mid_shift, mid_act), (out_scale, out_shift, out_act)
    if is_fused(dw_weight.shape[2] * dw_weight.shape[3], pw_weight.shape[0]):
        return _fused(x, dw_weight, pw_weight, head, middle, tail, residual, stride, padding, dilation, stats)
    mid, _, _ = depthwise_fwd(x, dw_weight, *head, *middle, None, stride, padding, dilation, False)
    return pointwise_fwd(mid, pw_weight, None, None, 0, *tail, residual, (1, 1), stats)
