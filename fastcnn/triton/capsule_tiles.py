"""What the capsule routing kernels share: tiles of images and input capsules, and products instead of votes.

A vote w = u W is met by a vector of its output capsule, or summed over the input capsules. Neither needs the vote:

    w . v             = sum over d of u[d] g[d],  g[d] = sum over e of W[d, e] v[e]     (``pull``, then ``agreement``)
    sum over i of c w = sum over (i, d) of (c u)[i, d] W[i, d, e]                       (a product with c u, ``coupled``)

Both are matrix products for a tensor core, one output capsule at a time, so that the number of output capsules is the
length of a loop and padded to nothing. Shapes: B images, I input capsules and D of their coordinates, E coordinates of
an output capsule; a tile of u is [B, I * D] and one of W is [I * D, E].
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastcnn.triton.launch import MAX_MATRIX, cdiv, pow2

# Of one sum, whose chunks' shares go through memory: a wave of four on each of an H100's 132 SMs.
PROGRAMS = 528


@triton.jit
def input_tile(
    images, capsules, in_caps, D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The offsets of a tile [B, I * D] of u, and which of its images x capsules there are."""
    image = tl.arange(0, BLOCK_B)
    column = tl.arange(0, BLOCK_I * BLOCK_D)
    capsule = column // BLOCK_D
    d = column % BLOCK_D
    offsets = image[:, None] * (in_caps * D) + (capsule * D + d)[None, :]
    return offsets, (image < images)[:, None] & ((capsule < capsules) & (d < D))[None, :]


@triton.jit
def pair_tile(images, capsules, in_caps, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr):
    """The offsets of a tile [B, I] of [batch, in_caps], and which of its images x capsules there are."""
    image = tl.arange(0, BLOCK_B)
    capsule = tl.arange(0, BLOCK_I)
    return image[:, None] * in_caps + capsule[None, :], (image < images)[:, None] & (capsule < capsules)[None, :]


@triton.jit
def weight_tile(
    capsules, stride, D: tl.constexpr, E: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The offsets of a tile [I * D, E] of one output capsule's W (stride: between input capsules), and which there are."""
    row = tl.arange(0, BLOCK_I * BLOCK_D)
    capsule = row // BLOCK_D
    d = row % BLOCK_D
    e = tl.arange(0, BLOCK_E)
    offsets = (capsule * stride + d * E)[:, None] + e[None, :]
    return offsets, ((capsule < capsules) & (d < D))[:, None] & (e < E)[None, :]


@triton.jit
def output_tile(images, stride, E: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """The offsets of one output capsule of several images [B, E], and which there are."""
    image = tl.arange(0, BLOCK_B)
    e = tl.arange(0, BLOCK_E)
    return image[:, None] * stride + e[None, :], (image < images)[:, None] & (e < E)[None, :]


@triton.jit
def pull(v, w, PRECISION: tl.constexpr):
    """W v [B, I * D] of v [B, E]: the gradient by u of the votes' product with v."""
    return tl.dot(v, tl.trans(w), input_precision=PRECISION)


@triton.jit
def agreement(u, pulled, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr):
    """The votes' product with v [B, I], from W v."""
    return tl.sum(tl.reshape(u * pulled, (BLOCK_B, BLOCK_I, BLOCK_D)), 2)


@triton.jit
def coupled(c, tile, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr):
    """c [B, I] times a tile [B, I * D]."""
    product = tl.reshape(tile, (BLOCK_B, BLOCK_I, BLOCK_D)) * c[:, :, None]
    return tl.reshape(product, (BLOCK_B, BLOCK_I * BLOCK_D))


@triton.jit
def coupling(
    u, pulled, statistics, pair_mask, plane, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The softmax [B, I] of the logits from W total; statistics points to the tile's, plane elements apart.

    The bound is for logits of 1e9 and more: sums in another order may exceed the largest by more than exp can take.
    """
    largest = tl.load(statistics, mask=pair_mask, other=0.0)
    scale = tl.load(statistics + plane, mask=pair_mask, other=0.0)
    return tl.exp(tl.minimum(agreement(u, pulled, BLOCK_B, BLOCK_I, BLOCK_D) - largest, 0.0)) * scale


@triton.jit
def logit_gradient(
    c, u, pulled, statistics, pair_mask, plane, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr
):
    """c (a - the mean of a under c) [B, I], a the votes' product with ds from W ds."""
    mean = tl.load(statistics + 2 * plane, mask=pair_mask, other=0.0)
    return c * (agreement(u, pulled, BLOCK_B, BLOCK_I, BLOCK_D) - mean)


@triton.jit
def fold_chunks(
    partials, offsets, mask, chunks, plane, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_CHUNKS: tl.constexpr
):
    """The sum of a tile [ROWS, E] over partials [chunks, plane], in an order that the sizes alone decide."""
    acc = tl.zeros([BLOCK_CHUNKS, ROWS, BLOCK_E], tl.float32)
    for first in range(0, chunks, BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)
        there = (chunk < chunks)[:, None, None] & mask[None, :, :]
        acc += tl.load(
            partials + chunk.to(tl.int64)[:, None, None] * plane + offsets[None, :, :], mask=there, other=0.0
        )
    return tl.sum(acc, 0)


class CapsuleTiles(NamedTuple):
    """The shape of a tile, how many there are, and how many blocks of input capsules make a chunk of a sum."""

    images: int
    capsules: int
    in_dim: int
    out_dim: int
    image_blocks: int
    capsule_blocks: int
    per_chunk: int

    def shape(self, images: int = 64) -> tuple[int, int, int, int]:
        """BLOCK_B, of so many images or fewer, BLOCK_I, BLOCK_D, BLOCK_E."""
        return min(self.images, max(16, images)), *self[1:4]

    @property
    def chunks(self) -> int:
        """Shares of a sum over the input capsules."""
        return cdiv(self.capsule_blocks, self.per_chunk)


def capsule_tiles(batch: int, in_caps: int, in_dim: int, out_caps: int, out_dim: int) -> CapsuleTiles:
    """The tiles for [batch, in_caps, in_dim] -> [out_caps, out_dim]; they depend on shapes alone, never on the GPU.

    64 images meet a tile of W, so that W is read twice for a batch of 100 and not 100 times. Three TF32 products hold
    both halves of both operands in registers: beside them there is room for 16 elements a thread of u, of each product
    with W and of c u, so 32 columns. Where one capsule has more, or an output capsule, 16 images.
    """
    block_d, block_e = pow2(in_dim, 1, MAX_MATRIX), pow2(out_dim, 16, MAX_MATRIX)
    columns = max(block_d, min(32, max(16, 1024 // block_e)))
    images = pow2(batch, 16, 64 if max(columns, block_e) <= 32 else 16)
    capsules = pow2(in_caps, max(1, 16 // block_d), columns // block_d)
    image_blocks, capsule_blocks = cdiv(batch, images), cdiv(in_caps, capsules)
    per_chunk = cdiv(capsule_blocks, max(1, PROGRAMS // (image_blocks * out_caps)))
    return CapsuleTiles(images, capsules, block_d, block_e, image_blocks, capsule_blocks, per_chunk)


class FoldBlocks(NamedTuple):
    """ROWS, BLOCK_E, BLOCK_CHUNKS of a kernel that folds the chunks' shares of rows of out_dim."""

    rows: int
    out_dim: int
    chunks: int


def fold_blocks(chunks: int, out_dim: int) -> FoldBlocks:
    """Tiles of about 128 columns, so that a thousand output capsules make a hundred programs, and 4,096 elements."""
    block = pow2(out_dim, 1, MAX_MATRIX)
    rows = max(1, 128 // block)
    return FoldBlocks(rows, block, pow2(chunks, 1, max(1, 4096 // (rows * block))))
