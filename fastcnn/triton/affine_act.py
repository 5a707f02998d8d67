"""Scale-shift-activation-residual over memory once, and the two sums of its backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.ops.layout import empty_nhwc
from fastcnn.ops.registry import Mutable
from fastcnn.triton.activations import activate, activate_after_residual, mask_gradient
from fastcnn.triton.launch import cdiv, given, nhwc, pow2, primitive, vector
from fastcnn.triton.prologue_epilogue import load_affine, per_channel
from fastcnn.triton.reductions import sum_rows

# Elements of a tile: 16 for each of 128 threads, two 16-byte loads in flight per operand in half precision.
TILE = 2048


@triton.jit(do_not_specialize=["M", "c_vectors", "y_vectors", "residual_vectors", "out_vectors"])
def affine_act_fwd_kernel(
    y, scale, shift, residual, out, M, c_vectors, y_vectors, residual_vectors, out_vectors,
    ACT: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[m, c] = act(scale[c] * y[m, c] + shift[c]) + residual[m, c]."""
    C = c_vectors * VEC
    tiles_c = tl.cdiv(C, BLOCK_C)
    first = tl.program_id(0) // tiles_c * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    channels = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    mask = (rows < M - first)[:, None] & channel_mask[None, :]
    base = first.to(tl.int64)
    y_ld = y_vectors * VEC
    residual_ld = residual_vectors * VEC
    out_ld = out_vectors * VEC
    value = tl.load(y + base * y_ld + rows[:, None] * y_ld + channels[None, :], mask=mask, other=0.0)
    if residual is not None:
        residual += base * residual_ld
    offsets = rows[:, None] * residual_ld + channels[None, :]
    result = activate(load_affine(value, scale, shift, channels, channel_mask), ACT)
    if residual is not None:
        result += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    result = activate_after_residual(result, ACT)
    tl.store(
        out + base * out_ld + rows[:, None] * out_ld + channels[None, :], result.to(out.dtype.element_ty), mask=mask
    )


@triton.jit(do_not_specialize=["M", "c_vectors", "grad_vectors", "y_vectors", "tiles_per_program"])
def affine_act_sums_kernel(
    grad, y, scale, shift, mean, partials, M, c_vectors, grad_vectors, y_vectors, tiles_per_program,
    ACT: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's share of [sum dz, sum dz * (y - mean)] (rows [programs, 2, C]), dz as in affine_act_sums."""
    C = c_vectors * VEC
    grad_ld = grad_vectors * VEC
    y_ld = y_vectors * VEC
    tiles_c = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0) // tiles_c
    rows = tl.arange(0, BLOCK_M)
    channels = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    moment = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(tiles_per_program):
        first = (program * tiles_per_program + tile) * BLOCK_M
        base = first.to(tl.int64)
        mask = (rows < M - first)[:, None] & channel_mask[None, :]
        g = tl.load(grad + base * grad_ld + rows[:, None] * grad_ld + channels[None, :], mask=mask, other=0.0)
        raw = tl.load(y + base * y_ld + rows[:, None] * y_ld + channels[None, :], mask=mask, other=0.0)
        dz = mask_gradient(g.to(tl.float32), load_affine(raw, scale, shift, channels, channel_mask), ACT)
        centred = raw.to(tl.float32)
        if mean is not None:
            centred -= per_channel(mean, channels, channel_mask)
        total += dz
        moment += dz * centred
    row = partials + program.to(tl.int64) * 2 * C + channels
    tl.store(row, tl.sum(total, 0), mask=channel_mask)
    tl.store(row + C, tl.sum(moment, 0), mask=channel_mask)


def sums_grid(m: int, channels: int) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, programs along m and tiles of each, for sums over [m, channels].

    About 2,000 programs: several waves on any GPU, and few enough rows for one folding of 256 and a last one.
    """
    block_c = pow2(channels, 16, 64)
    block_m = TILE // block_c
    tiles = cdiv(m, block_m)
    per_program = max(1, tiles * cdiv(channels, block_c) // 2048)
    return block_m, block_c, cdiv(tiles, per_program), per_program


@primitive
def affine_act_fwd(y: Tensor, scale: Tensor | None, shift: Tensor | None, act: int, residual: Tensor | None) -> Tensor:
    """act(scale * y + shift) + residual, in y's dtype, NHWC."""
    out = empty_nhwc(*y.shape, like=y)
    affine_act_into(out, y, scale, shift, act, residual)
    return out


@primitive
def affine_act_into(
    out: Mutable, y: Tensor, scale: Tensor | None, shift: Tensor | None, act: int, residual: Tensor | None
) -> None:
    """affine_act_fwd with its output written to ``out``, which may be a channel slice of an NHWC buffer."""
    y, y_ld = nhwc(y)
    residual, residual_ld = nhwc(residual)
    out_ld = given(out)
    n, c, h, w = y.shape
    m, vec, block_c = n * h * w, vector(c, y_ld, residual_ld, out_ld), pow2(c, 16, 256)
    block_m = TILE // block_c
    if m:
        affine_act_fwd_kernel[(cdiv(m, block_m) * cdiv(c, block_c),)](
            y, scale, shift, residual, out, m, c // vec, y_ld // vec, residual_ld // vec, out_ld // vec,
            act, vec, block_m, block_c, num_warps=4,
        )  # fmt: skip


@primitive
def affine_act_sums(
    grad: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None, act: int, mean: Tensor | None
) -> Tensor:
    """[sum dz, sum dz * (y - mean)] per channel, [2, C], where dz = grad * act'(scale * y + shift)."""
    grad, grad_ld = nhwc(grad)
    y, y_ld = nhwc(y)
    n, c, h, w = y.shape
    m, vec = n * h * w, vector(c, grad_ld, y_ld)
    block_m, block_c, programs, per_program = sums_grid(m, c)
    partials = torch.empty((programs, 2, c), dtype=torch.float32, device=y.device)
    if m:
        affine_act_sums_kernel[(programs * cdiv(c, block_c),)](
            grad, y, scale, shift, mean, partials, m, c // vec, grad_ld // vec, y_ld // vec, per_program,
            act, vec, block_m, block_c, num_warps=4,
        )  # fmt: skip
    return sum_rows(partials)
