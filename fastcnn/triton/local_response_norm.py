"""Local response normalisation across channels and its gradient: neighbours come from the caches, not from memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastcnn.ops.layout import empty_nhwc
from fastcnn.ops.local_response_norm import reach
from fastcnn.triton.launch import cdiv, nhwc, pow2, primitive

# Elements of a tile: 16 for each of 128 threads forward. Backward holds what 2 * size - 1 neighbours have at once where
# its loops are unrolled, so that each is loaded once and not for every window it is in: 4 a thread, without spills.
FORWARD_TILE, BACKWARD_TILE = 2048, 512
# Channels of the largest window whose loops are unrolled: backward then takes 128 registers a thread.
MAX_UNROLLED = 9


@triton.jit
def shifted(x, row, channel, shift, valid, C):
    """The values ``shift`` channels on of rows that start at x + row [rows, channels], float32, 0 where there is none."""
    channel += shift
    mask = valid[:, None] & ((channel >= 0) & (channel < C))[None, :]
    return tl.load(x + row[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def squared(x, row, channel, shift, valid, C):
    """The squares of `shifted`."""
    value = shifted(x, row, channel, shift, valid, C)
    return value * value


@triton.jit
def log2_denominators(
    x, row, channel, shift, valid, C, share, k, BEFORE: tl.constexpr, AFTER: tl.constexpr, UNROLLED: tl.constexpr
):
    """log2 of k + share * the sum of x^2 over the window of each channel, ``shift`` channels on."""
    total = tl.zeros([row.shape[0], channel.shape[0]], tl.float32)
    if UNROLLED:
        for i in tl.static_range(-BEFORE, AFTER + 1):
            total += squared(x, row, channel, shift + i, valid, C)
    else:
        for i in range(-BEFORE, AFTER + 1):
            total += squared(x, row, channel, shift + i, valid, C)
    return tl.log2(k + share * total)


@triton.jit
def passed_on(
    grad, grad_row, x, row, channel, shift, valid, C, share, beta, k,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """grad x d^(-beta - 1) of the channels ``shift`` on."""
    log_d = log2_denominators(x, row, channel, shift, valid, C, share, k, BEFORE, AFTER, UNROLLED)
    # Not d^(-beta - 1) at once: where x is large it vanishes, and x times it does not.
    direct = shifted(grad, grad_row, channel, shift, valid, C) * tl.exp2(-beta * log_d)
    return direct * (shifted(x, row, channel, shift, valid, C) * tl.exp2(-log_d))


# d^-beta is 2^(-beta log2 d) for any beta: two instructions of the special function unit, where d^-0.75 by roots is three.
@triton.jit(do_not_specialize=["M", "x_ld", "grad_ld"])
def local_response_norm_kernel(
    x, grad, out, M, x_ld, grad_ld, share, beta, k,
    C: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, UNROLLED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = x / d^beta or, with grad, the gradient of x."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pixel = tl.program_id(0) // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = pixel < M
    row = pixel.to(tl.int64) * x_ld
    factor = tl.exp2(-beta * log2_denominators(x, row, channel, 0, valid, C, share, k, BEFORE, AFTER, UNROLLED))
    value = shifted(x, row, channel, 0, valid, C)
    if grad is None:
        result = value * factor
    else:
        grad_row = pixel.to(tl.int64) * grad_ld
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        # Whose window sees a channel lies as far before it as a window reaches after its own.
        if UNROLLED:
            for i in tl.static_range(-AFTER, BEFORE + 1):
                total += passed_on(
                    grad, grad_row, x, row, channel, i, valid, C, share, beta, k, BEFORE, AFTER, UNROLLED
                )  # fmt: skip
        else:
            for i in range(-AFTER, BEFORE + 1):
                total += passed_on(
                    grad, grad_row, x, row, channel, i, valid, C, share, beta, k, BEFORE, AFTER, UNROLLED
                )  # fmt: skip
        result = shifted(grad, grad_row, channel, 0, valid, C) * factor - 2.0 * share * beta * value * total
    offsets = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=valid[:, None] & (channel < C)[None, :])


def _run(x: Tensor, grad: Tensor | None, size: int, alpha: float, beta: float, k: float) -> Tensor:
    x, x_ld = nhwc(x)
    grad, grad_ld = nhwc(grad)
    n, c, h, w = x.shape
    out, m = empty_nhwc(n, c, h, w, like=x), n * h * w
    before, after = reach(size, c)
    block_c = pow2(c, 16, 256)
    block_m = (FORWARD_TILE if grad is None else BACKWARD_TILE) // block_c
    if m:
        local_response_norm_kernel[(cdiv(m, block_m) * cdiv(c, block_c),)](
            x, grad, out, m, x_ld, grad_ld, alpha / size, beta, k,
            c, before, after, before + 1 + after <= MAX_UNROLLED, block_m, block_c, num_warps=4,
        )  # fmt: skip
    return out


@primitive
def local_response_norm_fwd(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """x / d^beta, d = k + alpha / size * the sum of x^2 over a window of ``size`` channels."""
    return _run(x, None, size, alpha, beta, k)


@primitive
def local_response_norm_bwd(grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """dx = grad d^-beta - 2 alpha beta / size * x * the sum of grad x d^(-beta - 1) over all windows that x is in."""
    return _run(x, grad, size, alpha, beta, k)
