"""The depthwise stencil on registers: a group of PT x QT outputs per row of a tile [groups, channels].

Neighbouring outputs share most of their inputs. A group loads each of its inputs once, applies the prologue once, and
feeds every output that needs it: 3 x 3, stride 1, 2 x 4 outputs take 4 x 6 = 24 loads instead of 72. Everything that
depends on PT, QT, stride and dilation is resolved at compile time; accumulators are a tuple, one tile per output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcnn.triton.activations import activate, mask_gradient
from fastcnn.triton.launch import cdiv, pow2
from fastcnn.triton.prologue_epilogue import affine, per_channel


@triton.constexpr_function
def tap_at(u, v, R, S, DH, DW):
    """The tap (r * S + s) that reads u rows and v columns from an output's first input, or -1."""
    if u % DH or v % DW or not (0 <= u // DH < R and 0 <= v // DW < S):
        return -1
    return u // DH * S + v // DW


@triton.jit
def group_origin(tile, tiles_q, PT: tl.constexpr, QT: tl.constexpr, TILE_P: tl.constexpr, TILE_Q: tl.constexpr):
    """Row and column of the first pixel of each of the TILE_P * TILE_Q groups in a tile of an image."""
    group = tl.arange(0, TILE_P * TILE_Q)
    row = (tile // tiles_q * TILE_P + group // TILE_Q) * PT
    column = (tile % tiles_q * TILE_Q + group % TILE_Q) * QT
    return row, column


@triton.jit
def zeros(COUNT: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tuple of COUNT accumulators."""
    acc = ()
    for _ in tl.static_range(COUNT):
        acc = acc + (tl.zeros([GROUPS, BLOCK_C], tl.float32),)
    return acc


@triton.jit
def stencil_rows(
    acc, x, ld, h0, w0, channels, channel_mask, H, W, in_scale, in_shift, taps, out_channels, C,
    IN_ACT: tl.constexpr, R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, PT: tl.constexpr, QT: tl.constexpr,
):  # fmt: skip
    """acc[i, j] += sum over r, s of prologue(x[h0 + i SH + r DH, w0 + j SW + s DW]) * taps[r, s] (taps [R * S, C])."""
    for u in tl.static_range((PT - 1) * SH + (R - 1) * DH + 1):
        h = h0 + u
        row_mask = (h >= 0) & (h < H)
        for v in tl.static_range((QT - 1) * SW + (S - 1) * DW + 1):
            w = w0 + v
            mask = (row_mask & (w >= 0) & (w < W))[:, None] & channel_mask[None, :]
            a = tl.load(x + ((h * W + w) * ld)[:, None] + channels[None, :], mask=mask, other=0.0)
            a = activate(affine(a, in_scale, in_shift), IN_ACT)
            if in_scale is not None or in_shift is not None:
                # The padding is of the activated input: zero after the prologue, not before.
                a = tl.where(mask, a, 0.0)
            for i in tl.static_range(PT):
                for j in tl.static_range(QT):
                    if tap_at(u - i * SH, v - j * SW, R, S, DH, DW) >= 0:
                        # Neighbouring outputs load the same taps; the compiler keeps one load of each.
                        tap = per_channel(
                            taps + tap_at(u - i * SH, v - j * SW, R, S, DH, DW) * C, out_channels, channel_mask
                        )
                        acc = acc[: i * QT + j] + (acc[i * QT + j] + a * tap,) + acc[i * QT + j + 1 :]
    return acc


@triton.jit
def stencil(
    acc, x, ld, h0, w0, channels, channel_mask, H, W, in_scale, in_shift, taps, out_channels, C,
    IN_ACT: tl.constexpr, R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, PT: tl.constexpr, QT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """stencil_rows over all rows of taps: unrolled, or (PT = 1) one row of taps at a time in a loop."""
    if UNROLL:
        acc = stencil_rows(
            acc, x, ld, h0, w0, channels, channel_mask, H, W, in_scale, in_shift, taps, out_channels, C,
            IN_ACT, R, S, SH, SW, DH, DW, PT, QT,
        )  # fmt: skip
    else:
        for r in range(R):
            acc = stencil_rows(
                acc, x, ld, h0 + r * DH, w0, channels, channel_mask, H, W, in_scale, in_shift,
                taps + r * S * C, out_channels, C, IN_ACT, 1, S, SH, SW, DH, DW, 1, QT,
            )  # fmt: skip
    return acc


@triton.constexpr_function
def first_gradient(padding, stride, dilation, taps):
    """The first output position, relative to a group's, that reaches the group's first pixel (ceiling division)."""
    return -(((taps - 1) * dilation - padding) // stride)


@triton.constexpr_function
def gradients(padding, stride, dilation, taps, pixels):
    """How many output positions reach a group of neighbouring pixels that starts at a multiple of the stride."""
    return (pixels - 1 + padding) // stride + ((taps - 1) * dilation - padding) // stride + 1


@triton.constexpr_function
def adjoint_tap(i, j, n, m, R, S, SH, SW, PH, PW, DH, DW):
    """The tap (r * S + s) through which pixel i, j of a group is read by output n, m from first_gradient on, or -1."""
    u = i + PH - (n - ((R - 1) * DH - PH) // SH) * SH
    v = j + PW - (m - ((S - 1) * DW - PW) // SW) * SW
    if u % DH or v % DW or not (0 <= u // DH < R and 0 <= v // DW < S):
        return -1
    return u // DH * S + v // DW


@triton.jit
def add_at(acc, K: tl.constexpr, value):
    """acc with value added to its K-th tile."""
    return acc[:K] + (acc[K] + value,) + acc[K + 1 :]


@triton.jit
def store_dx(
    acc, x, dx, ld, C, pixel, valid, channels, channel_mask, scale, shift, mean, total, moment,
    X_ACT: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Masks and stores one tile of dx, and adds it to the running sums."""
    mask = valid[:, None] & channel_mask[None, :]
    if X_ACT != 0 or SUMS:
        raw = tl.load(x + (pixel * ld)[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        acc = mask_gradient(acc, affine(raw, scale, shift), X_ACT)
    out = acc.to(dx.dtype.element_ty)
    tl.store(dx + (pixel * C)[:, None] + channels[None, :], out, mask=mask)
    if SUMS:
        out = tl.where(mask, out.to(tl.float32), 0.0)
        if mean is not None:
            raw -= mean
        total += out
        moment += out * raw
    return total, moment


# Up to 3 x 3 all rows of taps are unrolled, with two rows of outputs a group. Beyond, the code of two rows no longer
# fits registers and takes seconds to compile; the rows of taps are a loop, and inputs are shared along a row only.
UNROLLED_TAPS = 9


def tile_grid(p: int, q: int, pt: int, qt: int, groups: int) -> tuple[int, int, int, int]:
    """Groups of a tile down and across, and tiles of an image down and across.

    As square as possible in pixels, since the halo is read again by the neighbours (through L2), and no larger than the
    image: a 7 x 7 image takes 4 x 2 groups of 2 x 4.
    """
    tile_q = pow2(cdiv(q, qt), 1, 4 if groups * pt >= 32 else 2)
    tile_p = pow2(cdiv(p, pt), 1, groups // tile_q)
    return tile_p, tile_q, cdiv(p, pt * tile_p), cdiv(q, qt * tile_q)
