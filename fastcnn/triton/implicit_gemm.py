"""A convolution as a matrix product whose left operand is gathered from the image as it is loaded.

Row m of the operand is an output pixel, column (r * S + s) * K + k is channel k of the pixel that tap r, s of it reads.
A pixel's taps lie at the same distances from its first tap wherever it is, so the address of an element is the sum of
its row's and its column's; only whether it lies in the image is a question to each. Columns are dense: a tile of 64
takes 21 taps of a stem's 3 channels, and the divisions by K are a few per thread and tile.

Weights are [groups, C, R, S, K] for C and K channels of a group.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def pixel_position(pixel, P, Q):
    """Image, row and column of a pixel."""
    return pixel // (P * Q), pixel // Q % P, pixel % Q


@triton.jit
def split_column(column, K, S):
    """r, s, k of a column."""
    tap = column // K
    return tap // S, tap % S, column % K


@triton.jit
def gathered(pixels, distances, ld, channels):
    """The 64-bit offsets of the tile that reads ``channels`` of pixels + distances; what is outside of an image too.

    Only 32-bit numbers of pixels live through the loop over a product's k.
    """
    return (pixels[:, None] + distances[None, :]).to(tl.int64) * ld + channels[None, :]


@triton.jit
def inside(h, w, dh, dw, H, W):
    """Whether h + dh, w + dw is a pixel of the image, for rows h, w and columns dh, dw of a tile."""
    h = h[:, None] + dh[None, :]
    w = w[:, None] + dw[None, :]
    return (h >= 0) & (h < H) & (w >= 0) & (w < W)


# The least that a tile has of columns and of k.
NARROWEST = 16


def bundled(weight: Tensor, groups: int) -> int:
    """How many groups a program takes as one, with zeros for the weights between them: a divisor of groups.

    As many as fit the narrowest tile. A group of 4 channels (ResNeXt) would leave three quarters of it empty; four of
    them fill it with the same number of operations in a quarter of the programs, and load 16 channels side by side.
    The price is that a NaN or an infinity reaches the other groups of its bundle.
    """
    channels = max(weight.shape[0] // groups, weight.shape[1])
    return max(b for b in range(1, max(1, NARROWEST // channels) + 1) if groups % b == 0)


def tap_matrices(weight: Tensor, groups: int, bundle: int, x: Tensor) -> Tensor:
    """A weight [C, K, R, S] as [groups / bundle, bundle C', R, S, bundle K] in x's dtype (C' = C / groups)."""
    c, k, r, s = weight.shape
    taps = weight.to(x.dtype).permute(0, 2, 3, 1).reshape(groups // bundle, bundle, c // groups, r, s, k)
    if bundle > 1:
        blocks = taps.new_zeros(groups // bundle, bundle, c // groups, r, s, bundle, k)
        blocks.diagonal(dim1=1, dim2=5).copy_(taps.movedim(1, -1))
        taps = blocks
    return taps.reshape(groups // bundle, bundle * (c // groups), r, s, bundle * k).contiguous()


def weight_of_taps(taps: Tensor, bundle: int) -> Tensor:
    """The weight [C, K, R, S] whose tap_matrices these are; what lies between the groups of a bundle is dropped."""
    groups, c, r, s, k = taps.shape
    blocks = taps.view(groups, bundle, c // bundle, r, s, bundle, k // bundle).diagonal(dim1=1, dim2=5)
    return blocks.permute(0, 5, 1, 4, 2, 3).reshape(groups * c, k // bundle, r, s)
