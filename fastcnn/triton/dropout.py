"""Inverted dropout: the mask is drawn in registers, four words of Philox a counter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.ops.dropout import CHANNEL, ELEMENT, SAMPLE, mask_of, threshold
from fastcnn.ops.registry import Mutable
from fastcnn.triton.activations import activate, mask_gradient
from fastcnn.triton.launch import cdiv, empty, pow2, primitive
from fastcnn.triton.reductions import sum_rows

# Elements of a tile: 16 for each of 128 threads, so that four counters a thread are in flight.
TILE = 2048
PER_CHANNEL, PER_SAMPLE = tl.constexpr(CHANNEL), tl.constexpr(SAMPLE)
INTEGERS = ["rows", "channels", "rows_per_sample", "least"]


@triton.jit
def philox_words(seed, group):
    """The four words of the counters ``group`` (int64), each uint32 like it."""
    key = tl.load(seed)
    offset = tl.load(seed + 1)
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    zero = (low * 0).to(tl.uint32)
    offset_low = zero + (offset & 0xFFFFFFFF).to(tl.uint32)
    offset_high = zero + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(key, low, (group >> 32).to(tl.uint32), offset_low, offset_high)


@triton.jit
def draws_one_by_one(seed, index):
    """The draws of any indices: three of a counter's four words are for others."""
    w0, w1, w2, w3 = philox_words(seed, index >> 2)
    word = index & 3
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@triton.jit
def kept_tile(
    seed, row, first_channel, channels, rows_per_sample, least, UNIT: tl.constexpr, QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Which elements [BLOCK_M, BLOCK_C] of rows ``row`` and of the channels from first_channel on are kept.

    QUADS: every row of draws begins with a counter's first word.
    """
    row = row.to(tl.int64)
    if UNIT == PER_SAMPLE:
        drawn = draws_one_by_one(seed, (row // rows_per_sample)[:, None])
        return tl.broadcast_to(drawn.to(tl.int64) >= least, (BLOCK_M, BLOCK_C))
    if UNIT == PER_CHANNEL:
        row = row // rows_per_sample
    if QUADS:
        group = (row * channels // 4)[:, None] + first_channel // 4 + tl.arange(0, BLOCK_C // 4)[None, :]
        w0, w1, w2, w3 = philox_words(seed, group)
        drawn = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_M, BLOCK_C))
    else:
        index = (row * channels)[:, None] + first_channel + tl.arange(0, BLOCK_C)[None, :]
        drawn = draws_one_by_one(seed, index)
    return drawn.to(tl.int64) >= least


@triton.jit
def tile_position(rows, channels, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's rows, its channels and the first of them, its elements' offsets in memory, and which there are."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    row = tl.program_id(0) // tiles_c * BLOCK_M + tl.arange(0, BLOCK_M)
    first_channel = (tl.program_id(0) % tiles_c).to(tl.int64) * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)
    offsets = row.to(tl.int64)[:, None] * channels + channel[None, :]
    return row, channel, first_channel, offsets, (row < rows)[:, None] & (channel < channels)[None, :]


@triton.jit(do_not_specialize=INTEGERS)
def dropout_fwd_kernel(
    x, bias, residual, out, seed, rows, channels, rows_per_sample, least, scale,
    ACT: tl.constexpr, UNIT: tl.constexpr, QUADS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = kept * scale * act(x + bias) + residual."""
    channels = channels * VEC
    row, channel, first_channel, offsets, mask = tile_position(rows, channels, BLOCK_M, BLOCK_C)
    z = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    stays = kept_tile(seed, row, first_channel, channels, rows_per_sample, least, UNIT, QUADS, BLOCK_M, BLOCK_C)
    z = tl.where(stays, activate(z, ACT) * scale, 0.0)
    if residual is not None:
        z += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, z.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=INTEGERS)
def dropout_bwd_kernel(
    grad, z, bias, dx, partials, seed, rows, channels, rows_per_sample, least, scale,
    ACT: tl.constexpr, UNIT: tl.constexpr, QUADS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = kept * scale * grad * act'(z + bias), and the tile's sums over its rows (partials [tiles, channels])."""
    channels = channels * VEC
    row, channel, first_channel, offsets, mask = tile_position(rows, channels, BLOCK_M, BLOCK_C)
    g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    stays = kept_tile(seed, row, first_channel, channels, rows_per_sample, least, UNIT, QUADS, BLOCK_M, BLOCK_C)
    g = tl.where(stays, g * scale, 0.0)
    if ACT != 0:
        value = tl.load(z + offsets, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
        g = mask_gradient(g, value, ACT)
    tl.store(dx + offsets, g.to(dx.dtype.element_ty), mask=mask)
    if partials is not None:
        tile = (tl.program_id(0) // tl.cdiv(channels, BLOCK_C)).to(tl.int64)
        tl.store(partials + tile * channels + channel, tl.sum(g, 0), mask=channel < channels)


def _plan(x: Tensor, bias: Tensor | None, p: float, scale: float, unit: int) -> tuple[tuple, tuple, int, int]:
    """The kernels' sizes and constants, the tiles along the rows, and those along the channels."""
    mask = mask_of(x, bias, unit)
    vec = 8 if mask.channels % 8 == 0 else 1
    quads = mask.channels % 4 == 0 or (mask.unit == ELEMENT and mask.rows == 1)
    block_c = pow2(mask.channels, 16, TILE)
    block_m = TILE // block_c
    sizes = (mask.rows, mask.channels // vec, mask.rows_per_sample, threshold(p), scale)
    constants = (mask.unit, quads, vec, block_m, block_c)
    return sizes, constants, cdiv(mask.rows, block_m), cdiv(mask.channels, block_c)


@primitive
def dropout_fwd(
    x: Tensor,
    bias: Tensor | None,
    act: int,
    residual: Tensor | None,
    p: float,
    scale: float,
    unit: int,
    seed: Tensor,
) -> Tensor:
    """mask * scale * act(x + bias) + residual."""
    out = torch.empty_like(x)
    sizes, constants, tiles_m, tiles_c = _plan(x, bias, p, scale, unit)
    if tiles_m * tiles_c:
        dropout_fwd_kernel[(tiles_m * tiles_c,)](x, bias, residual, out, seed, *sizes, act, *constants, num_warps=4)
    return out


@primitive
def dropout_bwd(
    grad: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    act: int,
    p: float,
    scale: float,
    unit: int,
    seed: Tensor,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """dx = mask * scale * grad * act'(z + bias), and its sum over all but the channels."""
    dx = torch.empty_like(grad)
    sizes, constants, tiles_m, tiles_c = _plan(grad, bias, p, scale, unit)
    partials = None
    if need_bias:
        partials = torch.empty((tiles_m, bias.shape[0]), dtype=torch.float32, device=grad.device)
    if tiles_m * tiles_c:
        dropout_bwd_kernel[(tiles_m * tiles_c,)](
            grad, z, bias, dx, partials, seed, *sizes, act, *constants, num_warps=4
        )
    return dx, sum_rows(partials) if need_bias else empty(grad)


@primitive
def dropout_inplace(x: Mutable, p: float, scale: float, unit: int, seed: Tensor) -> None:
    """x = mask * scale * x."""
    sizes, constants, tiles_m, tiles_c = _plan(x, None, p, scale, unit)
    if tiles_m * tiles_c:
        dropout_fwd_kernel[(tiles_m * tiles_c,)](x, None, None, x, seed, *sizes, 0, *constants, num_warps=4)
