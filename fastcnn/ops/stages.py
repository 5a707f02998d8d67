"""The stages of a chain: one convolution, or what stands in its place, forward and backward through the primitives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn.ops import activations
from fastcnn.ops.affine_act import copy_into
from fastcnn.ops.layout import conv_out_sizes
from fastcnn.ops.normalisation import Affine, Applied, BatchNorm, Kind, flatten
from fastcnn.ops.validation import kernel_of

Pair = tuple[int, int]
ops = torch.ops.fastcnn


@dataclass(frozen=True)
class Conv:
    """One convolution of a chain, then its bias, then its normalisation, then its activation.

    ``op`` is "pointwise", "depthwise", "separable" (weights: depthwise, pointwise), "conv2d", "average" (no weights: the mean
    of windows as large as the stride) or, as the first of a chain, "identity" (no weights): the input's own normalisation
    and activation, before the first convolution or alone; ``statistics`` are then the batch's mean and variance [K] of that
    input, where they are known.
    """

    op: str
    weights: tuple[Tensor, ...] = ()
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    norm: Affine | BatchNorm | None = None
    act: str = "none"
    bias: Tensor | None = None
    statistics: tuple[Tensor, Tensor] | None = None


class Geometry(NamedTuple):
    """A Conv without its tensors: what the autograd function keeps as a constant."""

    op: str
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    norm: Kind
    act: int


def sizes_along(shape: Sequence[int], convs: Sequence[Conv]) -> list[list[int]]:
    """[P, Q] after each stage of a chain over an input of this shape."""
    found, size = [], list(shape[2:])
    for conv in convs:
        size = conv_out_sizes(size, kernel_of(conv), conv.stride, conv.padding, conv.dilation)
        found.append(size)
    return found


STORE = (None, None, activations.NONE, None)  # the epilogue that does nothing
SLOTS = 6  # tensors per convolution: weight, second weight, scale, shift, mean, var


def flatten_stage(conv: Conv, acc: torch.dtype) -> tuple[Geometry, list[Tensor | None]]:
    """A stage's constant part and its tensors."""
    kind, (scale, shift, mean, var) = flatten(conv.norm, conv.bias, acc)
    if kind.trains and conv.statistics is not None:
        mean, var = conv.statistics
    where = (conv.stride, conv.padding, conv.dilation, conv.groups)
    weights = (*conv.weights, None, None)[:2]
    return Geometry(conv.op, *where, kind, activations.code(conv.act)), [*weights, scale, shift, mean, var]


def convolve(g: Geometry, x, weights, pre: Applied, act: int, stats: bool, epilogue=STORE):
    """Raw output, mean, var; or, with an epilogue (scale, shift, act, residual), what that makes of it.

    weights are two, the second None but for "separable".
    """
    head = (pre.scale, pre.shift, act)
    if g.op == "identity":
        return x, *(ops.channel_statistics(x) if stats else (None, None))
    if g.op == "average":
        return ops.avg_pool2d_fwd(x, *head, g.stride, g.stride, (0, 0), True), None, None
    if g.op == "pointwise":
        return ops.pointwise_fwd(x, weights[0], *head, *epilogue, g.stride, stats)
    geometry = (g.stride, g.padding, g.dilation)
    if g.op == "depthwise":
        return ops.depthwise_fwd(x, weights[0], *head, *epilogue, *geometry, stats)
    if g.op == "separable":
        return ops.separable_fwd(x, *weights, *head, None, None, 0, *epilogue, *geometry, stats)
    return ops.conv2d_fwd(x, weights[0], *head, *epilogue, *geometry, g.groups, stats)


def convolve_into(out: Tensor, g: Geometry, x: Tensor, weights, pre: Applied, act: int, epilogue=STORE) -> None:
    """convolve with an epilogue, without statistics, whose output is written to a channel slice of an NHWC buffer."""
    head = (pre.scale, pre.shift, act)
    if g.op == "pointwise":
        ops.pointwise_into(out, x, weights[0], *head, *epilogue, g.stride, False)
    elif g.op == "conv2d":
        where = (g.stride, g.padding, g.dilation, g.groups)
        ops.conv2d_into(out, x, weights[0], *head, *epilogue, *where, False)
    else:
        y, *_ = convolve(g, x, weights, pre, act, False, epilogue)
        copy_into(out, y)


def _plus(dx: Tensor, residual: Tensor | None) -> Tensor:
    return dx if residual is None else dx + residual


def convolve_backward(g: Geometry, upstream, x, pre: Applied, act: int, weights, residual, need_dx, need_dw, need_sums):
    """dx plus residual, dw per weight, sums; upstream is (grad, y, y_scale, y_shift, y_act, coef)."""
    source = (x, pre.scale, pre.shift, act, pre.mean)
    geometry = (g.stride, g.padding, g.dilation)
    if g.op == "pointwise":
        dx, dw, sums = ops.pointwise_bwd(
            *upstream, *source, weights[0], residual, g.stride, need_dx, need_dw[0], need_sums
        )
        return dx, (dw, None), sums
    if g.op == "average":
        dx, sums = ops.avg_pool2d_bwd(upstream[0], *source, g.stride, g.stride, (0, 0), True, need_sums)
        return _plus(dx, residual), (None, None), sums
    if g.op == "depthwise":
        dx, dw, sums = ops.depthwise_bwd(*upstream, *source, weights[0], *geometry, need_dx, need_dw[0], need_sums)
        return _plus(dx, residual), (dw, None), sums
    if g.op == "conv2d":
        dx, dw, sums = ops.conv2d_bwd(
            *upstream, *source, weights[0], residual, *geometry, g.groups, need_dx, need_dw[0], need_sums
        )
        return dx, (dw, None), sums
    # The depthwise output was never stored: make it again, it costs less than the traffic of keeping it.
    mid, _, _ = convolve(g._replace(op="depthwise"), x, weights[:1], pre, act, False)
    need_mid = need_dx or need_dw[0]
    dmid, dpw, _ = ops.pointwise_bwd(
        *upstream, mid, None, None, 0, None, weights[1], None, (1, 1), need_mid, need_dw[1], False
    )
    if not need_mid:
        return dmid, (None, dpw), None
    dx, ddw, sums = ops.depthwise_bwd(
        dmid, None, None, None, 0, None, *source, weights[0], *geometry, need_dx, need_dw[0], need_sums
    )
    return _plus(dx, residual), (ddw, dpw), sums


def identity_backward(upstream, residual: Tensor | None) -> Tensor:
    """dx of a chain's own input, plus the gradient that reaches it as the residual."""
    grad, y, *prologue = upstream
    if y is not None:
        return ops.affine_act_dgrad(grad, y, *prologue, residual)
    return _plus(grad, residual)
