"""Lowers a chain whose normalisations are known beforehand to the widest fused forward primitives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ops = torch.ops.fastcnn


def _span(geometries: Sequence, i: int) -> int:
    """How many convolutions from i on run as one primitive."""
    kinds = [g.op for g in geometries[i : i + 3]]
    plain = [g.op == "pointwise" and g.stride == (1, 1) for g in geometries[i : i + 3]]
    if kinds[:2] == ["pointwise", "depthwise"] and plain[0]:
        return 3 if len(kinds) == 3 and plain[2] else 2
    if kinds[:2] == ["depthwise", "pointwise"] and plain[1]:
        return 2
    return 1


def _fused(x: Tensor, gs: Sequence, weights: Sequence, epilogues: Sequence, in_act: int, residual: Tensor | None):
    """One primitive over one, two or three convolutions."""
    head = (None, None, in_act)
    tails = [(e.scale, e.shift, g.act) for e, g in zip(epilogues, gs, strict=True)]
    first = gs[0]
    where = (first.stride, first.padding, first.dilation)
    if len(gs) == 1:
        w0, w1 = weights[0]
        if first.op == "pointwise":
            return ops.pointwise_fwd(x, w0, *head, *tails[0], residual, first.stride, False)[0]
        if first.op == "depthwise":
            return ops.depthwise_fwd(x, w0, *head, *tails[0], residual, *where, False)[0]
        if first.op == "separable":
            return ops.separable_fwd(x, w0, w1, *head, None, None, 0, *tails[0], residual, *where, False)[0]
        return ops.conv2d_fwd(x, w0, *head, *tails[0], residual, *where, first.groups, False)[0]
    if first.op == "depthwise":
        return ops.separable_fwd(
            x, weights[0][0], weights[1][0], *head, *tails[0], *tails[1], residual, *where, False
        )[0]
    middle = gs[1]
    project = weights[2][0] if len(gs) == 3 else None
    last = tails[2] if len(gs) == 3 else (None, None, 0)
    return ops.inverted_residual_fwd(
        x, weights[0][0], weights[1][0], project, *head, *tails[0], *tails[1], *last, residual,
        middle.stride, middle.padding, middle.dilation,
    )  # fmt: skip


def run(
    x: Tensor, geometries: Sequence, weights: Sequence, epilogues: Sequence, in_act: int, residual: Tensor | None
) -> Tensor:
    """The chain's output [N, C, P, Q]; every normalisation and activation is an epilogue, nothing is saved."""
    i = 0
    while i < len(geometries):
        end = i + _span(geometries, i)
        last = end == len(geometries)
        span = slice(i, end)
        x = _fused(
            x, geometries[span], weights[span], epilogues[span], in_act if i == 0 else 0, residual if last else None
        )
        i = end
    return x
