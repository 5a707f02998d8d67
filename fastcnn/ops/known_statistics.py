"""Batch statistics that the node which wrote a tensor took on the way: the next BatchNorm needs no pass for its own.

A dense block knows those of every channel it wrote, which is what the transition after it normalises with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn.ops.normalisation import BatchNorm


def remember_statistics(node, output: Tensor, mean: Tensor, var: Tensor) -> None:
    """Leaves the statistics [C] of a node's output with it; inference mode's tensors do not tell whether they change."""
    if output.is_inference():
        return
    node.known_statistics = (output._version, mean, var)


def known_statistics(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor] | None:
    """The batch's mean and variance of x, or None: unknown, x changed since, not asked for, or to be shared by processes."""
    if torch.compiler.is_compiling() or not norm.training or norm.group is not None:
        return None
    known = getattr(x.grad_fn, "known_statistics", None)
    return known[1:] if known is not None and known[0] == x._version else None
