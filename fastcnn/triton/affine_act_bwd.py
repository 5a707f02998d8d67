"""Backward passes over memory at the ends of a chain, and a tensor's own statistics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.ops.layout import empty_nhwc
from fastcnn.triton.activations import mask_gradient
from fastcnn.triton.affine_act import TILE, sums_grid
from fastcnn.triton.launch import cdiv, empty, nhwc, pow2, primitive, vector
from fastcnn.triton.prologue_epilogue import load_coefficients, load_gradient, per_channel
from fastcnn.triton.reductions import merge_moments, moments_buffer, sum_rows, tile_moments


@triton.jit(do_not_specialize=["M", "c_vectors", "grad_vectors", "y_vectors", "residual_vectors"])
def affine_act_dgrad_kernel(
    grad, y, scale, shift, coef, residual, dx, M, c_vectors, grad_vectors, y_vectors, residual_vectors,
    ACT: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx[m, c] = dy[m, c] + residual[m, c], dy of the gradient prologue."""
    C = c_vectors * VEC
    tiles_c = tl.cdiv(C, BLOCK_C)
    first = tl.program_id(0) // tiles_c * BLOCK_M
    rows = tl.arange(0, BLOCK_M)[:, None]
    channels = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    mask = (rows < M - first) & channel_mask[None, :]
    base = first.to(tl.int64)
    grad += base * (grad_vectors * VEC)
    y += base * (y_vectors * VEC)
    if scale is not None:
        scale = per_channel(scale, channels, channel_mask)
    if shift is not None:
        shift = per_channel(shift, channels, channel_mask)
    if coef is not None:
        coef = load_coefficients(coef, channels, channel_mask, C)
    grad_offsets = rows * (grad_vectors * VEC) + channels[None, :]
    y_offsets = rows * (y_vectors * VEC) + channels[None, :]
    dy = load_gradient(grad, grad_offsets, y, y_offsets, scale, shift, ACT, coef, mask)
    if residual is not None:
        residual += base * (residual_vectors * VEC)
        dy += tl.load(residual + rows * (residual_vectors * VEC) + channels[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(dx + base * C + rows * C + channels[None, :], dy.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "c_vectors", "grad_vectors", "out_vectors", "y_vectors", "tiles_per_program"])
def residual_act_bwd_kernel(
    grad, out, y, mean, dz, partials, M, c_vectors, grad_vectors, out_vectors, y_vectors, tiles_per_program,
    ACT: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz = grad * act'(out), and a program's share of [sum dz, sum dz * (y - mean)] unless partials is None."""
    C = c_vectors * VEC
    tiles_c = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0) // tiles_c
    rows = tl.arange(0, BLOCK_M)[:, None]
    channels = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    columns = channels[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    moment = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(tiles_per_program):
        first = (program * tiles_per_program + tile) * BLOCK_M
        base = first.to(tl.int64)
        mask = (rows < M - first) & channel_mask[None, :]
        g = tl.load(grad + base * (grad_vectors * VEC) + rows * (grad_vectors * VEC) + columns, mask=mask, other=0.0)
        z = tl.load(out + base * (out_vectors * VEC) + rows * (out_vectors * VEC) + columns, mask=mask, other=0.0)
        g = mask_gradient(g.to(tl.float32), z.to(tl.float32), ACT).to(dz.dtype.element_ty)
        tl.store(dz + base * C + rows * C + columns, g, mask=mask)
        if partials is not None:
            raw = tl.load(y + base * (y_vectors * VEC) + rows * (y_vectors * VEC) + columns, mask=mask, other=0.0)
            centred = raw.to(tl.float32)
            if mean is not None:
                centred -= per_channel(mean, channels, channel_mask)
            total += g.to(tl.float32)
            moment += g.to(tl.float32) * centred
    if partials is not None:
        row = partials + program.to(tl.int64) * 2 * C + channels
        tl.store(row, tl.sum(total, 0), mask=channel_mask)
        tl.store(row + C, tl.sum(moment, 0), mask=channel_mask)


@triton.jit(do_not_specialize=["M", "c_vectors", "x_vectors"])
def channel_statistics_kernel(
    x, moments, M, c_vectors, x_vectors, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A tile's mean and squared deviations of each channel (tile_moments)."""
    C = c_vectors * VEC
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) // tiles_c
    tile_c = tl.program_id(0) % tiles_c
    rows = tl.arange(0, BLOCK_M)
    channels = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    valid = rows < M - tile * BLOCK_M
    offsets = rows[:, None] * (x_vectors * VEC) + channels[None, :]
    x += (tile * BLOCK_M).to(tl.int64) * (x_vectors * VEC)
    mask = valid[:, None] & channel_mask[None, :]
    tile_moments(x, offsets, mask, valid, moments, tile, tl.cdiv(M, BLOCK_M), channels, channel_mask, C, tile_c == 0)


@primitive
def affine_act_dgrad(
    grad: Tensor,
    y: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: int,
    coef: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """The gradient prologue's dy, written to memory, plus residual; in grad's dtype, NHWC."""
    grad, grad_ld = nhwc(grad)
    y, y_ld = nhwc(y)
    residual, residual_ld = nhwc(residual)
    n, c, h, w = y.shape
    dx = empty_nhwc(n, c, h, w, like=grad)
    m, vec, block_c = n * h * w, vector(c, grad_ld, y_ld, residual_ld), pow2(c, 16, 256)
    block_m = TILE // block_c
    if m:
        affine_act_dgrad_kernel[(cdiv(m, block_m) * cdiv(c, block_c),)](
            grad, y, scale, shift, coef, residual, dx,
            m, c // vec, grad_ld // vec, y_ld // vec, residual_ld // vec, act, vec, block_m, block_c, num_warps=4,
        )  # fmt: skip
    return dx


@primitive
def residual_act_bwd(
    grad: Tensor, out: Tensor, act: int, y: Tensor, mean: Tensor | None, need_sums: bool
) -> tuple[Tensor, Tensor]:
    """dz = grad * act'(z) where out = act(z), NHWC, and [sum dz, sum dz * (y - mean)] per channel, [2, C]."""
    grad, grad_ld = nhwc(grad)
    out, out_ld = nhwc(out)
    y, y_ld = nhwc(y)
    n, c, h, w = grad.shape
    dz = empty_nhwc(n, c, h, w, like=grad)
    m, vec = n * h * w, vector(c, grad_ld, out_ld, y_ld)
    block_m, block_c, programs, per_program = sums_grid(m, c)
    partials = torch.empty((programs, 2, c), dtype=torch.float32, device=grad.device) if need_sums else None
    if m:
        residual_act_bwd_kernel[(programs * cdiv(c, block_c),)](
            grad, out, y, mean, dz, partials, m, c // vec, grad_ld // vec, out_ld // vec, y_ld // vec, per_program,
            act, vec, block_m, block_c, num_warps=4,
        )  # fmt: skip
    return dz, sum_rows(partials) if need_sums else empty(grad)


@primitive
def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of each channel."""
    x, x_ld = nhwc(x)
    n, c, h, w = x.shape
    m, vec, block_c = n * h * w, vector(c, x_ld), pow2(c, 16, 64)
    # 64 elements for each of 256 threads: 12,544 tiles of a batch of 256 at 56 x 56, two foldings.
    block_m = 16384 // block_c
    tiles = cdiv(m, block_m)
    moments = moments_buffer(tiles, c, x)
    if m:
        channel_statistics_kernel[(tiles * cdiv(c, block_c),)](
            x, moments, m, c // vec, x_ld // vec, vec, block_m, block_c, num_warps=8
        )
    return merge_moments(moments, tiles, c)
