"""Depthwise convolution, forward: one stencil per channel, vectorised over channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.ops.layout import conv_out_sizes, empty_nhwc
from fastcnn.triton.launch import cdiv, empty, nhwc, pow2, primitive, vector
from fastcnn.triton.prologue_epilogue import epilogue, per_channel
from fastcnn.triton.reductions import merge_moments, moments_buffer
from fastcnn.triton.stencil import UNROLLED_TAPS, group_origin, stencil, tile_grid, zeros

Pair = tuple[int, int]


@triton.jit
def group_moments(values, valids, partials, tile, tiles, channels, channel_mask, C, FIRST, COUNT: tl.constexpr):
    """reductions.tile_moments of a tile held as a tuple of COUNT tiles [groups, channels]."""
    count = 0.0
    total = 0.0
    for k in tl.static_range(COUNT):
        count += tl.sum(valids[k].to(tl.float32), 0)
        total += tl.where(valids[k][:, None], values[k], 0.0)
    mean = tl.sum(total, 0) / count
    squares = 0.0
    for k in tl.static_range(COUNT):
        deviation = tl.where(valids[k][:, None], values[k] - mean[None, :], 0.0)
        squares += deviation * deviation
    plane = tiles.to(tl.int64) * C
    row = partials + tile.to(tl.int64) * C + channels
    tl.store(row, mean, mask=channel_mask)
    tl.store(row + plane, tl.sum(squares, 0), mask=channel_mask)
    tl.store(partials + 2 * plane + tile, count, mask=FIRST)


@triton.jit(do_not_specialize=["images", "c_vectors", "x_vectors", "residual_vectors", "H", "W", "P", "Q"])
def depthwise_fwd_kernel(
    x, taps, y, in_scale, in_shift, out_scale, out_shift, residual, moments,
    images, c_vectors, x_vectors, residual_vectors, H, W, P, Q,
    IN_ACT: tl.constexpr, OUT_ACT: tl.constexpr, MULTIPLIER: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, VEC: tl.constexpr, PT: tl.constexpr, QT: tl.constexpr,
    TILE_P: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y[p, q, c] = epilogue(sum over r, s of prologue(x[p SH - PH + r DH, ..., c / MULTIPLIER]) * taps[r, s, c])."""
    C = c_vectors * VEC
    x_ld = x_vectors * VEC
    residual_ld = residual_vectors * VEC
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles_q = tl.cdiv(Q, QT * TILE_Q)
    tiles = tl.cdiv(P, PT * TILE_P) * tiles_q
    tile = tl.program_id(0) // tiles_c
    image = (tile // tiles).to(tl.int64)
    p0, q0 = group_origin(tile % tiles, tiles_q, PT, QT, TILE_P, TILE_Q)
    channels = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C

    if in_scale is not None:
        in_scale = per_channel(in_scale, channels // MULTIPLIER, channel_mask)
    if in_shift is not None:
        in_shift = per_channel(in_shift, channels // MULTIPLIER, channel_mask)
    acc = zeros(PT * QT, TILE_P * TILE_Q, BLOCK_C)
    acc = stencil(
        acc, x + image * H * W * x_ld, x_ld, p0 * SH - PH, q0 * SW - PW, channels // MULTIPLIER, channel_mask, H, W,
        in_scale, in_shift, taps, channels, C, IN_ACT, R, S, SH, SW, DH, DW, PT, QT, UNROLL,
    )  # fmt: skip

    y += image * P * Q * C
    if residual is not None:
        residual += image * P * Q * residual_ld
    if out_scale is not None:
        out_scale = per_channel(out_scale, channels, channel_mask)
    if out_shift is not None:
        out_shift = per_channel(out_shift, channels, channel_mask)
    outs = ()
    valids = ()
    for k in tl.static_range(PT * QT):
        p = p0 + k // QT
        q = q0 + k % QT
        valid = (p < P) & (q < Q)
        pixel = p * Q + q
        mask = valid[:, None] & channel_mask[None, :]
        residual_offsets = (pixel * residual_ld)[:, None] + channels[None, :]
        value = epilogue(acc[k], out_scale, out_shift, OUT_ACT, residual, residual_offsets, mask)
        out = value.to(y.dtype.element_ty)
        tl.store(y + (pixel * C)[:, None] + channels[None, :], out, mask=mask)
        outs = outs + (out.to(tl.float32),)
        valids = valids + (valid,)
    if moments is not None:
        group_moments(
            outs, valids, moments, tile, images * tiles, channels, channel_mask, C,
            tl.program_id(0) % tiles_c == 0, PT * QT,
        )  # fmt: skip


def taps_of(weight: Tensor, x: Tensor) -> Tensor:
    """A depthwise weight [C, 1, R, S] as [R * S, C] in x's dtype: a tap of neighbouring channels is one vector load."""
    c, _, r, s = weight.shape
    taps = torch.empty((r * s, c), dtype=x.dtype, device=x.device)
    return taps.copy_(weight.view(c, r * s).t() if weight.is_contiguous() else weight.reshape(c, r * s).t())


class DepthwiseTile(NamedTuple):
    """How a depthwise kernel cuts its images: groups down and across, tiles down and across, channels, warps."""

    p: int
    q: int
    down: int
    across: int
    c: int
    warps: int


def depthwise_tile(p: int, q: int, pt: int, qt: int, c: int, itemsize: int, width: int) -> DepthwiseTile:
    """Up to 16 groups of pt x qt pixels and a line of channels, ``width`` channels a thread, up to 8 warps.

    The width is what registers allow with two blocks on an SM: 8 accumulators of 4 channels are 32, and their inputs as
    many again. A line is 128 bytes, or 64 where a thread has one channel: fewer groups would read more halo.
    """
    block_c = pow2(c, 16, (64 if width == 1 else 128) // itemsize)
    tile_p, tile_q, down, across = tile_grid(p, q, pt, qt, min(16, 256 * width // block_c))
    return DepthwiseTile(tile_p, tile_q, down, across, block_c, pow2(tile_p * tile_q * block_c // (32 * width), 1, 8))


@primitive
def depthwise_fwd(
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
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise convolution with prologue and epilogue; weight [K * multiplier, 1, R, S]. Returns y, mean, var."""
    x, x_ld = nhwc(x)
    residual, residual_ld = nhwc(residual)
    (n, k, h, w), (c, _, r, s) = x.shape, weight.shape
    p, q = conv_out_sizes((h, w), (r, s), stride, padding, dilation)
    y = empty_nhwc(n, c, p, q, like=x)
    unroll = r * s <= UNROLLED_TAPS
    # 2 x 4 outputs of a 3 x 3 cost 3 loads each instead of 9. With a stride rows share too little: 5.6 against 6.8.
    pt, qt = 2 if unroll and p > 1 and stride[0] == 1 else 1, 4 if q > 2 else 1
    tile = depthwise_tile(p, q, pt, qt, c, x.element_size(), (8 if s <= 15 else 4) // x.element_size())
    rows = n * tile.down * tile.across
    moments = moments_buffer(rows, c, x) if stats else None
    vec = vector(c, x_ld, residual_ld)
    if rows:
        depthwise_fwd_kernel[(rows * cdiv(c, tile.c),)](
            x, taps_of(weight, x), y, in_scale, in_shift, out_scale, out_shift, residual, moments,
            n, c // vec, x_ld // vec, residual_ld // vec, h, w, p, q,
            in_act, out_act, c // k, r, s, *stride, *padding, *dilation, vec, pt, qt, tile.p, tile.q, tile.c, unroll,
            num_warps=tile.warps,
        )  # fmt: skip
    return (y, *merge_moments(moments, rows, c)) if stats else (y, empty(x), empty(x))
