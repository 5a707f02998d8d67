"""Average pooling with the normalisation and activation before it as its prologue, and its backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.ops.layout import conv_out_sizes, empty_nhwc
from fastcnn.triton.activations import activate, mask_gradient
from fastcnn.triton.affine_act import TILE, sums_grid
from fastcnn.triton.implicit_gemm import pixel_position
from fastcnn.triton.launch import cdiv, empty, nhwc, pow2, primitive, vector
from fastcnn.triton.prologue_epilogue import affine, load_affine, per_channel
from fastcnn.triton.reductions import sum_rows

Pair = tuple[int, int]

SIZES = ["M", "H", "W", "P", "Q"]


@triton.jit
def covered(first, size, LENGTH: tl.constexpr, PADDING: tl.constexpr, COUNTS_PADDING: tl.constexpr):
    """How many positions of a window from ``first`` on its mean divides by, along one axis."""
    if COUNTS_PADDING or PADDING == 0:
        return tl.full(first.shape, LENGTH, tl.int32)
    else:
        return tl.minimum(first + LENGTH, size) - tl.maximum(first, 0)


@triton.jit(do_not_specialize=["c_vectors", "x_vectors", *SIZES])
def avg_pool2d_fwd_kernel(
    x, scale, shift, y, c_vectors, x_vectors, M, H, W, P, Q,
    ACT: tl.constexpr, R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, COUNTS_PADDING: tl.constexpr,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[m, c] = the mean of act(scale[c] * x[h, w, c] + shift[c]) over the window of output pixel m."""
    C = c_vectors * VEC
    x_ld = x_vectors * VEC
    tiles_c = tl.cdiv(C, BLOCK_C)
    pixel = tl.program_id(0) // tiles_c * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    image, p, q = pixel_position(pixel, P, Q)
    h0 = p * SH - PH
    w0 = q * SW - PW
    if scale is not None:
        scale = per_channel(scale, channels, channel_mask)
    if shift is not None:
        shift = per_channel(shift, channels, channel_mask)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tap in range(R * S):
        h = h0 + tap // S
        w = w0 + tap % S
        valid = (pixel < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        mask = valid[:, None] & channel_mask[None, :]
        offsets = ((image * H + h) * W + w).to(tl.int64)[:, None] * x_ld + channels[None, :]
        z = activate(affine(tl.load(x + offsets, mask=mask, other=0.0), scale, shift), ACT)
        if scale is not None or shift is not None:
            # The padding is of the activated input: zero after the prologue, not before.
            z = tl.where(mask, z, 0.0)
        total += z
    count = covered(h0, H, R, PH, COUNTS_PADDING) * covered(w0, W, S, PW, COUNTS_PADDING)
    mask = (pixel < M)[:, None] & channel_mask[None, :]
    offsets = pixel.to(tl.int64)[:, None] * C + channels[None, :]
    tl.store(y + offsets, (total / count.to(tl.float32)[:, None]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def spread(
    grad, ld, pixel, valid, channels, channel_mask, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, COUNTS_PADDING: tl.constexpr,
):  # fmt: skip
    """The gradient of input pixels [pixels, channels], float32: what every window that holds one passes to it."""
    image, h, w = pixel_position(pixel, H, W)
    h += PH
    w += PW
    acc = tl.zeros([pixel.shape[0], channels.shape[0]], tl.float32)
    COLUMNS: tl.constexpr = (S + SW - 1) // SW
    for window in range((R + SH - 1) // SH * COLUMNS):
        p = h // SH - window // COLUMNS
        q = w // SW - window % COLUMNS
        inside = valid & (p >= 0) & (p < P) & (q >= 0) & (q < Q) & (h - p * SH < R) & (w - q * SW < S)
        mask = inside[:, None] & channel_mask[None, :]
        offsets = ((image * P + p) * Q + q).to(tl.int64)[:, None] * ld + channels[None, :]
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        count = covered(p * SH - PH, H, R, PH, COUNTS_PADDING) * covered(q * SW - PW, W, S, PW, COUNTS_PADDING)
        # What a window outside of the image would divide by may be 0.
        acc += g / tl.maximum(count, 1).to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=["c_vectors", "grad_vectors", "x_vectors", "tiles_per_program", *SIZES])
def avg_pool2d_bwd_kernel(
    grad, x, scale, shift, mean, dx, partials, c_vectors, grad_vectors, x_vectors, tiles_per_program, M, H, W, P, Q,
    ACT: tl.constexpr, R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, COUNTS_PADDING: tl.constexpr,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = act'(scale * x + shift) * spread(grad), and a program's share of its sums unless partials is None."""
    C = c_vectors * VEC
    x_ld = x_vectors * VEC
    tiles_c = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0) // tiles_c
    channels = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    moment = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(tiles_per_program):
        pixel = (program * tiles_per_program + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = pixel < M
        mask = valid[:, None] & channel_mask[None, :]
        dz = spread(
            grad, grad_vectors * VEC, pixel, valid, channels, channel_mask, H, W, P, Q,
            R, S, SH, SW, PH, PW, COUNTS_PADDING,
        )  # fmt: skip
        base = pixel.to(tl.int64)[:, None]
        if ACT != 0 or partials is not None:
            raw = tl.load(x + base * x_ld + channels[None, :], mask=mask, other=0.0).to(tl.float32)
            dz = mask_gradient(dz, load_affine(raw, scale, shift, channels, channel_mask), ACT)
        tl.store(dx + base * C + channels[None, :], dz.to(dx.dtype.element_ty), mask=mask)
        if partials is not None:
            if mean is not None:
                raw -= per_channel(mean, channels, channel_mask)
            total += dz
            moment += dz * raw
    if partials is not None:
        row = partials + program.to(tl.int64) * 2 * C + channels
        tl.store(row, tl.sum(total, 0), mask=channel_mask)
        tl.store(row + C, tl.sum(moment, 0), mask=channel_mask)


@primitive
def avg_pool2d_fwd(
    x: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    counts_padding: bool,
) -> Tensor:
    """The mean of in_act(in_scale * x + in_shift) over every window, [N, C, H, W] to [N, C, P, Q]."""
    x, x_ld = nhwc(x)
    n, c, h, w = x.shape
    p, q = conv_out_sizes((h, w), kernel, stride, padding)
    y = empty_nhwc(n, c, p, q, like=x)
    m, vec, block_c = n * p * q, vector(c, x_ld), pow2(c, 16, 256)
    block_m = TILE // block_c
    if m:
        avg_pool2d_fwd_kernel[(cdiv(m, block_m) * cdiv(c, block_c),)](
            x, in_scale, in_shift, y, c // vec, x_ld // vec, m, h, w, p, q,
            in_act, *kernel, *stride, *padding, counts_padding, vec, block_m, block_c, num_warps=4,
        )  # fmt: skip
    return y


@primitive
def avg_pool2d_bwd(
    grad: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_act: int,
    x_mean: Tensor | None,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    counts_padding: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient before the prologue's normalisation, masked by its activation, and its sums [2, C]."""
    grad, grad_ld = nhwc(grad)
    (n, c, h, w), (p, q) = x.shape, grad.shape[2:]
    # Its values are not read elsewhere, and it may be a stand-in of the right shape.
    x, x_ld = nhwc(x if x_act or need_sums else None)
    dx = empty_nhwc(n, c, h, w, like=grad)
    m, vec = n * h * w, vector(c, grad_ld, x_ld)
    block_m, block_c, programs, per_program = sums_grid(m, c)
    partials = torch.empty((programs, 2, c), dtype=torch.float32, device=grad.device) if need_sums else None
    if m:
        avg_pool2d_bwd_kernel[(programs * cdiv(c, block_c),)](
            grad, x, x_scale, x_shift, x_mean, dx, partials,
            c // vec, grad_ld // vec, x_ld // vec, per_program, m, h, w, p, q,
            x_act, *kernel, *stride, *padding, counts_padding, vec, block_m, block_c, num_warps=4,
        )  # fmt: skip
    return dx, sum_rows(partials) if need_sums else empty(grad)
