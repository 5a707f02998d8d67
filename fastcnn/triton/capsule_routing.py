"""Capsule routing forward: an iteration's softmax statistics, its sums over the input capsules, and their squash.

The softmax runs over the output capsules and the sum over the input capsules, so that neither fits one program: the
first kernel leaves two numbers for each image and input capsule, and the second makes the coupling anew from them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.triton.capsule_tiles import (
    CapsuleTiles,
    agreement,
    capsule_tiles,
    coupled,
    coupling,
    fold_blocks,
    fold_chunks,
    input_tile,
    logit_gradient,
    output_tile,
    pair_tile,
    pull,
    weight_tile,
)
from fastcnn.triton.launch import PRECISION, cdiv, primitive
from fastcnn.triton.squash import row_tile, squash_rows

# Below every logit, and finite: its difference from itself is 0.
LOWEST = tl.constexpr(-3.4e38)


@triton.jit(do_not_specialize=["batch", "in_caps", "out_caps"])
def capsule_statistics_kernel(
    u, weight, total, ds, statistics, batch, in_caps, out_caps,
    LEAKY: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of the logits w . total over the output capsules: the largest and 1 / the sum of exponentials, [2, batch, in_caps].

    With ds a third: the mean of w . ds under their softmax. One pass (Milakov & Gimelshein 2018, arXiv 1805.02867).
    """
    # The image blocks of the same input capsules run side by side: they read the same weights.
    image_blocks = tl.cdiv(batch, BLOCK_B)
    first = tl.program_id(0) // image_blocks * BLOCK_I
    image = tl.program_id(0) % image_blocks * BLOCK_B
    images = batch - image
    capsules = in_caps - first
    out_stride = out_caps * E
    pair = image.to(tl.int64) * in_caps + first
    inputs, input_mask = input_tile(images, capsules, in_caps, D, BLOCK_B, BLOCK_I, BLOCK_D)
    weights, weight_mask = weight_tile(capsules, out_stride * D, D, E, BLOCK_I, BLOCK_D, BLOCK_E)
    outputs, output_mask = output_tile(images, out_stride, E, BLOCK_B, BLOCK_E)
    x = tl.load(u + pair * D + inputs, mask=input_mask, other=0.0).to(tl.float32)
    weight += first.to(tl.int64) * (out_stride * D)
    total += image.to(tl.int64) * out_stride
    largest = tl.full([BLOCK_B, BLOCK_I], 0.0 if LEAKY else LOWEST, tl.float32)
    norm = tl.full([BLOCK_B, BLOCK_I], 1.0 if LEAKY else 0.0, tl.float32)
    mean = tl.zeros([BLOCK_B, BLOCK_I], tl.float32)
    for o in range(out_caps):
        w = tl.load(weight + o * (D * E) + weights, mask=weight_mask, other=0.0).to(tl.float32)
        v = tl.load(total + o * E + outputs, mask=output_mask, other=0.0)
        logit = agreement(x, pull(v, w, PRECISION), BLOCK_B, BLOCK_I, BLOCK_D)
        top = tl.maximum(largest, logit)
        kept = tl.exp(largest - top)
        added = tl.exp(logit - top)
        norm = norm * kept + added
        if ds is not None:
            g = tl.load(ds + image.to(tl.int64) * out_stride + o * E + outputs, mask=output_mask, other=0.0)
            mean = mean * kept + added * agreement(x, pull(g, w, PRECISION), BLOCK_B, BLOCK_I, BLOCK_D)
        largest = top
    pairs, pair_mask = pair_tile(images, capsules, in_caps, BLOCK_B, BLOCK_I)
    plane = batch.to(tl.int64) * in_caps
    tl.store(statistics + pair + pairs, largest, mask=pair_mask)
    tl.store(statistics + plane + pair + pairs, 1 / norm, mask=pair_mask)
    if ds is not None:
        tl.store(statistics + 2 * plane + pair + pairs, mean / norm, mask=pair_mask)


@triton.jit(do_not_specialize=["batch", "in_caps", "out_caps", "per_chunk"])
def capsule_sums_kernel(
    u, weight, total, ds, statistics, partials, batch, in_caps, out_caps, per_chunk,
    D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A share of the sum of c w over per_chunk blocks of input capsules (partials [chunks, batch, out_caps, E]).

    c is the coupling coefficient or, with ds, the gradient of its logit; without total it is 1.
    """
    image_blocks = tl.cdiv(batch, BLOCK_B)
    image = tl.program_id(0) % image_blocks * BLOCK_B
    o = tl.program_id(0) // image_blocks % out_caps
    chunk = tl.program_id(0) // (image_blocks * out_caps)
    images = batch - image
    out_stride = out_caps * E
    outputs, output_mask = output_tile(images, out_stride, E, BLOCK_B, BLOCK_E)
    output = image.to(tl.int64) * out_stride + o * E
    if total is not None:
        v = tl.load(total + output + outputs, mask=output_mask, other=0.0)
    if ds is not None:
        g = tl.load(ds + output + outputs, mask=output_mask, other=0.0)
    plane = batch.to(tl.int64) * in_caps
    acc = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    for block in range(per_chunk):
        first = (chunk * per_chunk + block) * BLOCK_I
        capsules = in_caps - first
        pair = image.to(tl.int64) * in_caps + first
        inputs, input_mask = input_tile(images, capsules, in_caps, D, BLOCK_B, BLOCK_I, BLOCK_D)
        weights, weight_mask = weight_tile(capsules, out_stride * D, D, E, BLOCK_I, BLOCK_D, BLOCK_E)
        x = tl.load(u + pair * D + inputs, mask=input_mask, other=0.0).to(tl.float32)
        own = weight + first.to(tl.int64) * (out_stride * D) + o * (D * E)
        w = tl.load(own + weights, mask=weight_mask, other=0.0).to(tl.float32)
        if total is not None:
            pairs, pair_mask = pair_tile(images, capsules, in_caps, BLOCK_B, BLOCK_I)
            known = statistics + pair + pairs
            c = coupling(x, pull(v, w, PRECISION), known, pair_mask, plane, BLOCK_B, BLOCK_I, BLOCK_D)
            if ds is not None:
                by_ds = pull(g, w, PRECISION)
                c = logit_gradient(c, x, by_ds, known, pair_mask, plane, BLOCK_B, BLOCK_I, BLOCK_D)
            x = coupled(c, x, BLOCK_B, BLOCK_I, BLOCK_D)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    tl.store(partials + chunk.to(tl.int64) * batch * out_stride + output + outputs, acc, mask=output_mask)


@triton.jit(do_not_specialize=["chunks", "rows", "out_caps", "scale"])
def capsule_outputs_kernel(
    partials, bias, s, earlier, total, v, chunks, rows, out_caps, scale,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """s = scale * the sum of partials + bias for rows [batch * out_caps, E], then total = earlier + squash(s), or v."""
    offsets, mask = row_tile(rows, E, ROWS, BLOCK_E)
    value = scale * fold_chunks(partials, offsets, mask, chunks, rows.to(tl.int64) * E, ROWS, BLOCK_E, BLOCK_CHUNKS)
    if bias is not None:
        capsule = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)) % out_caps
        value += tl.load(bias + capsule[:, None] * E + tl.arange(0, BLOCK_E)[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(s + offsets, value, mask=mask)
    output = squash_rows(value)
    if v is not None:
        tl.store(v + offsets, output.to(v.dtype.element_ty), mask=mask)
    if total is not None:
        if earlier is not None:
            output += tl.load(earlier + offsets, mask=mask, other=0.0)
        tl.store(total + offsets, output, mask=mask)


def capsule_pass(
    u: Tensor,
    weight: Tensor,
    total: Tensor | None,
    ds: Tensor | None,
    statistics: Tensor | None,
    partials: Tensor | None,
    tiles: CapsuleTiles,
    leaky: bool,
) -> None:
    """One iteration's statistics, but for the first, which has no total, and the shares of its sums, if asked for."""
    (batch, in_caps, in_dim), (_, out_caps, _, out_dim) = u.shape, weight.shape
    dims = in_dim, out_dim, PRECISION, *tiles.shape()
    if total is not None:
        capsule_statistics_kernel[(tiles.image_blocks * tiles.capsule_blocks,)](
            u, weight, total, ds, statistics, batch, in_caps, out_caps, leaky, *dims, num_warps=4
        )
    if partials is not None:
        capsule_sums_kernel[(tiles.image_blocks * tiles.chunks * out_caps,)](
            u, weight, total, ds, statistics, partials, batch, in_caps, out_caps, tiles.per_chunk, *dims, num_warps=4
        )


@primitive
def capsule_routing_fwd(
    u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool
) -> tuple[Tensor, Tensor]:
    """v [batch, out_caps, out_dim] in u's dtype, and s of every iteration [iterations, batch, out_caps, out_dim]."""
    u, weight, bias = u.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    batch, (in_caps, out_caps, in_dim, out_dim) = u.shape[0], weight.shape
    v = u.new_empty(batch, out_caps, out_dim)
    s = torch.empty((iterations, *v.shape), dtype=torch.float32, device=u.device)
    if batch == 0:
        return v, s
    tiles, rows = capsule_tiles(batch, in_caps, in_dim, out_caps, out_dim), batch * out_caps
    fold = fold_blocks(tiles.chunks, out_dim)
    partials, total = s.new_empty(tiles.chunks, *v.shape), torch.empty_like(s[0])
    statistics = s.new_empty(2, batch, in_caps)
    for t in range(iterations):
        so_far, last = total if t else None, t == iterations - 1
        capsule_pass(u, weight, so_far, None, statistics, partials, tiles, leaky)
        capsule_outputs_kernel[(cdiv(rows, fold.rows),)](
            partials, bias, s[t], so_far, None if last else total, v if last else None,
            tiles.chunks, rows, out_caps, 1.0 if t else 1 / (out_caps + leaky), out_dim, *fold, num_warps=4,
        )  # fmt: skip
    return v, s
