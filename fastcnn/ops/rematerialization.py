"""Outputs of chains that backward makes again: act(scale * y + shift) + residual, from the raw output y.

A block's output is the next block's input, which the weight gradient of its first convolution needs. The node that made
it (``x.grad_fn``) keeps y anyway, for the BatchNorm's backward; so the next node keeps no x and asks x's node for it: one
pass over memory, the same bits. What is made stays with its node until that node's own backward, since a residual needs
its predecessors in turn. An x that was changed in place since, or comes from elsewhere, is kept as torch would.

The nodes here are the contexts of conv_chain's autograd function. A graph that was freed, or a parameter that was changed
in place, between forward and backward is torch's usual error, also where only a later layer's gradients are asked for.
A write through ``.data`` is seen here as little as by torch: an x that was changed so is made again as it was before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn.ops.normalisation import Applied

INPUT, RESIDUAL = 0, 1  # places in a node's next_functions: its tensor arguments, None left out


class Saved(NamedTuple):
    """What a node keeps."""

    out: Tensor | None  # where the mask of an activation after a residual cannot be made again
    raw: list[Tensor | None]  # the input, then every convolution's output
    norms: list[Applied]
    tensors: list[Tensor | None]  # the arguments of every stage


def is_remade(x: Tensor) -> bool:
    """Whether backward can make x again: it is, unchanged, the output of a chain that kept what that takes."""
    if torch.compiler.is_compiling():
        return False
    version = getattr(x.grad_fn, "output_version", None)
    return version is not None and version == x._version


def saved(node) -> Saved:
    """A node's saved tensors; asked for once, whoever is first, since non-reentrant checkpointing gives them once."""
    if node.unpacked is None:
        n = len(node.geometries)
        out, *rest = node.saved_tensors
        norms = [Applied(*rest[i : i + 4]) for i in range(n + 1, 5 * n + 1, 4)]
        node.unpacked = Saved(out, rest[: n + 1], norms, rest[5 * n + 1 :])
    return node.unpacked


def input_of(node) -> Tensor:
    """The input of a chain, kept or made again."""
    return output_of(node.next_functions[INPUT][0]) if node.input_remade else saved(node).raw[0]


def output_of(node) -> Tensor:
    """The output of a chain, made again; residuals first, down to one that was kept."""
    path = [node]
    while path[-1].output is None and (before := _residual_node(path[-1])) is not None:
        path.append(before)
    for each in reversed(path):
        if each.output is None:
            each.output = _make(each)
    return node.output


def release(node) -> None:
    """Lets go of what was unpacked and made."""
    node.unpacked = node.output = None


def _residual_node(node):
    if node.adds_input:
        return node.next_functions[INPUT][0] if node.input_remade else None
    return node.next_functions[RESIDUAL][0] if node.residual_remade else None


def _make(node) -> Tensor:
    before, kept = _residual_node(node), saved(node)
    residual = before.output if before is not None else kept.raw[0] if node.adds_input else None
    y, norm = kept.raw[-1], kept.norms[-1]
    return torch.ops.fastcnn.affine_act_fwd(y, norm.scale, norm.shift, node.geometries[-1].act, residual)
