"""Lowers a chain whose normalisations are known beforehand to the widest fused forward primitives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn import backends
from fastcnn.ops import activations
from fastcnn.ops.affine_act import copy_into

ops = torch.ops.fastcnn


class Step(NamedTuple):
    """One primitive over one, two or three convolutions: op(x, *before, residual, *after).

    A pooling takes no residual.
    """

    op: Callable
    before: tuple
    after: tuple
    takes_residual: bool = True
    into: Callable | None = None  # the primitive that writes into a slice of a buffer
    packed: tuple | None = None  # `before` with weights in the CPU backend's own layout; never where x is traced


def pack(plan: Sequence[Step], dtype: torch.dtype) -> list[Step]:
    """The plan with its weights packed once for the CPU backend, where that backend is there and has the dtype."""
    from fastcnn import cpu

    if cpu.unavailable() or dtype not in cpu.DTYPES:
        return list(plan)
    return [
        s._replace(packed=cpu.pack_arguments(_name(s.op), s.before, s.after, dtype)) if s.takes_residual else s
        for s in plan
    ]


def _name(op: Callable) -> str:
    return op._schema.name.removeprefix("fastcnn::")


def _run_packed(step: Step, x: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor | tuple | None:
    """The step on the CPU backend with its packed weights, or None where another backend is chosen."""
    name, args = _name(step.op), (x, *step.packed, residual, *step.after)
    if out is not None:
        name, args = _name(step.into), (out, *args)
    if backends.selected(name, args) != "cpu":
        return None
    return backends.choose(name, args)(*args)


def _span(geometries: Sequence, i: int) -> int:
    """How many convolutions from i on run as one primitive."""
    kinds = [g.op for g in geometries[i : i + 3]]
    plain = [g.op == "pointwise" and g.stride == (1, 1) for g in geometries[i : i + 3]]
    if kinds[:2] == ["pointwise", "depthwise"] and plain[0]:
        return 3 if len(kinds) == 3 and plain[2] else 2
    if kinds[:2] == ["depthwise", "pointwise"] and plain[1]:
        return 2
    return 1


def _step(gs: Sequence, weights: Sequence, epilogues: Sequence, head: tuple) -> Step:
    tails = [(e.scale, e.shift, g.act) for e, g in zip(epilogues, gs, strict=True)]
    first, (w0, w1) = gs[0], weights[0]
    where = (first.stride, first.padding, first.dilation)
    if len(gs) == 1:
        if first.op == "average":
            window = (first.stride, first.stride, (0, 0), True)
            return Step(ops.avg_pool2d_fwd.default, head, window, takes_residual=False)
        if first.op == "pointwise":
            after = (first.stride, False)
            return Step(ops.pointwise_fwd.default, (w0, *head, *tails[0]), after, into=ops.pointwise_into.default)
        if first.op == "depthwise":
            return Step(ops.depthwise_fwd.default, (w0, *head, *tails[0]), (*where, False))
        if first.op == "separable":
            return Step(ops.separable_fwd.default, (w0, w1, *head, None, None, 0, *tails[0]), (*where, False))
        after = (*where, first.groups, False)
        return Step(ops.conv2d_fwd.default, (w0, *head, *tails[0]), after, into=ops.conv2d_into.default)
    second = weights[1][0]
    if first.op == "depthwise":
        return Step(ops.separable_fwd.default, (w0, second, *head, *tails[0], *tails[1]), (*where, False))
    project, last = (weights[2][0], tails[2]) if len(gs) == 3 else (None, (None, None, 0))
    middle = gs[1]
    return Step(
        ops.inverted_residual_fwd.default,
        (w0, second, project, *head, *tails[0], *tails[1], *last),
        (middle.stride, middle.padding, middle.dilation),
    )


def steps(geometries: Sequence, weights: Sequence, epilogues: Sequence, head: tuple) -> list[Step]:
    """The chain as primitives.

    weights are pairs (the second None but for "separable"), epilogues scales and shifts; head is the scale, shift and
    activation code of the first convolution's prologue.
    """
    if not geometries:
        return [Step(ops.affine_act_fwd.default, head, ())]
    result, i = [], 0
    while i < len(geometries):
        span = slice(i, i + _span(geometries, i))
        result.append(_step(geometries[span], weights[span], epilogues[span], head))
        i, head = span.stop, (None, None, activations.NONE)
    return result


def _run_into(out: Tensor, x: Tensor, step: Step, residual: Tensor | None) -> None:
    """The step with its output in a slice."""
    if step.into is None:
        y = step.op(x, *step.before, residual, *step.after)
        copy_into(out, y if isinstance(y, Tensor) else y[0])
    elif step.packed is None or _run_packed(step, x, residual, out) is None:
        step.into(out, x, *step.before, residual, *step.after)


def run(x: Tensor, plan: Sequence[Step], residual: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The chain's output [N, C, P, Q]; every normalisation and activation is an epilogue, nothing is saved.

    With ``out``, a channel slice of an NHWC buffer, the output is written there.
    """
    last = len(plan) - 1
    for i, step in enumerate(plan):
        tail = residual if i == last else None
        if out is not None and i == last:
            _run_into(out, x, step, tail)
            return out
        y = None if step.packed is None else _run_packed(step, x, tail, None)
        if y is None:
            y = step.op(x, *step.before, *((tail,) if step.takes_residual else ()), *step.after)
        x = y if isinstance(y, Tensor) else y[0]
    return x
