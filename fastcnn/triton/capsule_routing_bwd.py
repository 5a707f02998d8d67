"""Capsule routing backward: from the last iteration to the first as in forward, then a kernel for du and one for dW.

With a = w . ds and dl = c (a - sum over o of c a) the gradient of a vote is the sum over iterations of c ds + dl total:

    total's gradient = sum over i of dl w (v of every earlier iteration is in it)
    du = sum over o and iterations of c W ds + dl W total
    dW = sum over images and iterations of (c u) ds + (dl u) total

totals (the sums of v before each iteration) and ds of all iterations are [iterations, batch, out_caps, E].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.triton.capsule_routing import capsule_pass
from fastcnn.triton.capsule_tiles import (
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
from fastcnn.triton.launch import PRECISION, cdiv, empty, primitive
from fastcnn.triton.reductions import sum_rows
from fastcnn.triton.squash import row_blocks, row_tile, squash_gradient_rows, squash_rows


@triton.jit(do_not_specialize=["rows", "iterations"])
def capsule_totals_kernel(
    grad, s, totals, ds, rows, iterations, E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr
):
    """totals of all iterations but the first, and ds of the last, from grad and s, for rows [batch * out_caps, E]."""
    offsets, mask = row_tile(rows, E, ROWS, BLOCK_E)
    plane = rows.to(tl.int64) * E
    total = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for _ in range(1, iterations):
        total += squash_rows(tl.load(s + offsets, mask=mask, other=0.0))
        s += plane
        totals += plane
        tl.store(totals + offsets, total, mask=mask)
    g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    last = squash_gradient_rows(g, tl.load(s + offsets, mask=mask, other=0.0))
    tl.store(ds + (iterations - 1) * plane + offsets, last, mask=mask)


@triton.jit(do_not_specialize=["chunks", "rows"])
def capsule_step_back_kernel(
    partials, s, earlier, dv, ds, chunks, rows,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """dv = earlier + the sum of partials (v is in the totals of all later iterations), and ds, its gradient by s."""
    offsets, mask = row_tile(rows, E, ROWS, BLOCK_E)
    g = fold_chunks(partials, offsets, mask, chunks, rows.to(tl.int64) * E, ROWS, BLOCK_E, BLOCK_CHUNKS)
    if earlier is not None:
        g += tl.load(earlier + offsets, mask=mask, other=0.0)
    tl.store(dv + offsets, g, mask=mask)
    tl.store(ds + offsets, squash_gradient_rows(g, tl.load(s + offsets, mask=mask, other=0.0)), mask=mask)


@triton.jit(do_not_specialize=["batch", "in_caps", "out_caps", "start", "iterations", "scale"])
def capsule_input_gradient_kernel(
    u, weight, totals, ds, statistics, du, batch, in_caps, out_caps, start, iterations, scale,
    FIRST: tl.constexpr, DETACH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """du = the sum over output capsules and iterations of c W ds + dl W total.

    The iterations are those from start (1 or later) and, with FIRST, the first, whose coupling is scale.
    """
    image_blocks = tl.cdiv(batch, BLOCK_B)
    first = tl.program_id(0) // image_blocks * BLOCK_I
    image = tl.program_id(0) % image_blocks * BLOCK_B
    images = batch - image
    capsules = in_caps - first
    out_stride = out_caps * E
    outputs, output_mask = output_tile(images, out_stride, E, BLOCK_B, BLOCK_E)
    weights, weight_mask = weight_tile(capsules, out_stride * D, D, E, BLOCK_I, BLOCK_D, BLOCK_E)
    inputs, input_mask = input_tile(images, capsules, in_caps, D, BLOCK_B, BLOCK_I, BLOCK_D)
    pairs, pair_mask = pair_tile(images, capsules, in_caps, BLOCK_B, BLOCK_I)
    pair = image.to(tl.int64) * in_caps + first
    plane = batch.to(tl.int64) * out_stride
    pair_plane = batch.to(tl.int64) * in_caps
    outputs += image.to(tl.int64) * out_stride
    weight += first.to(tl.int64) * (out_stride * D)
    x = tl.load(u + pair * D + inputs, mask=input_mask, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_B, BLOCK_I * BLOCK_D], tl.float32)
    for o in range(out_caps):
        w = tl.load(weight + o * (D * E) + weights, mask=weight_mask, other=0.0).to(tl.float32)
        output = o * E + outputs
        if FIRST:
            g = tl.load(ds + output, mask=output_mask, other=0.0)
            acc += scale * pull(g, w, PRECISION)
        for t in range(start, iterations):
            known = statistics + 3 * t * pair_plane + pair + pairs
            by_ds = pull(tl.load(ds + t * plane + output, mask=output_mask, other=0.0), w, PRECISION)
            by_total = pull(tl.load(totals + t * plane + output, mask=output_mask, other=0.0), w, PRECISION)
            c = coupling(x, by_total, known, pair_mask, pair_plane, BLOCK_B, BLOCK_I, BLOCK_D)
            acc += coupled(c, by_ds, BLOCK_B, BLOCK_I, BLOCK_D)
            if not DETACH:
                dl = logit_gradient(c, x, by_ds, known, pair_mask, pair_plane, BLOCK_B, BLOCK_I, BLOCK_D)
                acc += coupled(dl, by_total, BLOCK_B, BLOCK_I, BLOCK_D)
    tl.store(du + pair * D + inputs, acc.to(du.dtype.element_ty), mask=input_mask)


@triton.jit(do_not_specialize=["batch", "in_caps", "out_caps", "start", "iterations", "scale"])
def capsule_weight_gradient_kernel(
    u, weight, totals, ds, statistics, dw, batch, in_caps, out_caps, start, iterations, scale,
    FIRST: tl.constexpr, DETACH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dW = the sum over images and iterations of (c u) ds + (dl u) total, the iterations as in du."""
    first = tl.program_id(0) // out_caps * BLOCK_I
    o = tl.program_id(0) % out_caps
    capsules = in_caps - first
    out_stride = out_caps * E
    weights, weight_mask = weight_tile(capsules, out_stride * D, D, E, BLOCK_I, BLOCK_D, BLOCK_E)
    own = first.to(tl.int64) * (out_stride * D) + o * (D * E)
    w = tl.load(weight + own + weights, mask=weight_mask, other=0.0).to(tl.float32)
    plane = batch.to(tl.int64) * out_stride
    pair_plane = batch.to(tl.int64) * in_caps
    acc = tl.zeros([BLOCK_I * BLOCK_D, BLOCK_E], tl.float32)
    for image in range(0, batch, BLOCK_B):
        images = batch - image
        outputs, output_mask = output_tile(images, out_stride, E, BLOCK_B, BLOCK_E)
        inputs, input_mask = input_tile(images, capsules, in_caps, D, BLOCK_B, BLOCK_I, BLOCK_D)
        pairs, pair_mask = pair_tile(images, capsules, in_caps, BLOCK_B, BLOCK_I)
        pair = tl.cast(image, tl.int64) * in_caps + first
        output = tl.cast(image, tl.int64) * out_stride + o * E + outputs
        x = tl.load(u + pair * D + inputs, mask=input_mask, other=0.0).to(tl.float32)
        if FIRST:
            g = tl.load(ds + output, mask=output_mask, other=0.0)
            acc = tl.dot(tl.trans(x), scale * g, acc, input_precision=PRECISION)
        for t in range(start, iterations):
            known = statistics + 3 * t * pair_plane + pair + pairs
            g = tl.load(ds + t * plane + output, mask=output_mask, other=0.0)
            v = tl.load(totals + t * plane + output, mask=output_mask, other=0.0)
            c = coupling(x, pull(v, w, PRECISION), known, pair_mask, pair_plane, BLOCK_B, BLOCK_I, BLOCK_D)
            cu = coupled(c, x, BLOCK_B, BLOCK_I, BLOCK_D)
            acc = tl.dot(tl.trans(cu), g, acc, input_precision=PRECISION)
            if not DETACH:
                by_ds = pull(g, w, PRECISION)
                dl = logit_gradient(c, x, by_ds, known, pair_mask, pair_plane, BLOCK_B, BLOCK_I, BLOCK_D)
                dlu = coupled(dl, x, BLOCK_B, BLOCK_I, BLOCK_D)
                acc = tl.dot(tl.trans(dlu), v, acc, input_precision=PRECISION)
    tl.store(dw + own + weights, acc, mask=weight_mask)


def _prepared(grad: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """totals of all iterations but the first, and ds of the last."""
    iterations, batch, out_caps, out_dim = s.shape
    totals, ds = torch.empty_like(s), torch.empty_like(s)
    rows, (block_rows, block, warps) = batch * out_caps, row_blocks(out_dim)
    capsule_totals_kernel[(cdiv(rows, block_rows),)](
        grad, s, totals, ds, rows, iterations, out_dim, block_rows, block, num_warps=warps
    )
    return totals, ds


@primitive
def capsule_routing_bwd(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    s: Tensor,
    leaky: bool,
    detach: bool,
    need_du: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """du like u, dW and dbias [out_caps, out_dim] of a forward whose s this is; what was not asked for is empty."""
    grad, u, weight, s = grad.contiguous(), u.contiguous(), weight.contiguous(), s.contiguous()
    (batch, in_caps, in_dim), (iterations, _, out_caps, out_dim) = u.shape, s.shape
    du = torch.empty_like(u) if need_du else u.new_empty(0)
    dw = torch.empty_like(weight, dtype=torch.float32) if need_dw else empty(u)
    if batch == 0:
        return du, dw.zero_(), s.new_zeros(out_caps, out_dim)
    tiles, last, rows = capsule_tiles(batch, in_caps, in_dim, out_caps, out_dim), iterations - 1, batch * out_caps
    totals, ds = _prepared(grad, s)
    statistics, dv = s.new_empty(iterations, 3, batch, in_caps), torch.empty_like(s[0])
    partials, fold = s.new_empty(tiles.chunks, *dv.shape), fold_blocks(tiles.chunks, out_dim)
    for t in range(last, 0, -1):
        if detach:
            capsule_pass(u, weight, totals[t], None, statistics[t], None, tiles, leaky)
            break
        capsule_pass(u, weight, totals[t], ds[t], statistics[t], partials, tiles, leaky)
        capsule_step_back_kernel[(cdiv(rows, fold.rows),)](
            partials, s[t - 1], None if t == last else dv, dv, ds[t - 1], tiles.chunks, rows,
            out_dim, *fold, num_warps=4,
        )  # fmt: skip
    first = last == 0 or not detach
    known = totals, ds, statistics
    how = batch, in_caps, out_caps, 1 if first else last, iterations, 1 / (out_caps + leaky), first, detach
    dims = in_dim, out_dim, PRECISION
    # Products for two sums, and both halves of each: fewer images where an output capsule takes more registers.
    if need_du:
        shape = tiles.shape(1024 // tiles.out_dim)
        capsule_input_gradient_kernel[(cdiv(batch, shape[0]) * tiles.capsule_blocks,)](
            u, weight, *known, du, *how, *dims, *shape, num_warps=4
        )
    if need_dw:
        capsule_weight_gradient_kernel[(tiles.capsule_blocks * out_caps,)](
            u, weight, *known, dw, *how, *dims, *tiles.shape(512 // tiles.out_dim), num_warps=4
        )
    return du, dw, sum_rows(ds[0 if first else last :].flatten(0, 1))
