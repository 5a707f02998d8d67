"""Branches over one input whose outputs are concatenated along the channels: Inception's blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcnn.cpu import memory
from fastcnn.nn.folded import FoldedChain
from fastcnn.nn.sequential import fold_layers, run_layers
from fastcnn.ops.layout import empty_nhwc


class Fork(NamedTuple):
    """Branches that all read what the layers before them made: the last entry of a branch that fans out."""

    branches: Sequence[Branch]


# A module, or layers in their order; the last may be a Fork.
Branch = nn.Module | Sequence[nn.Module | Fork]


def _parts(branch: Branch) -> tuple[Sequence[nn.Module], Fork | None]:
    """A branch's layers, those of a plain nn.Sequential one by one, and its fork."""
    if isinstance(branch, nn.Module):
        return (tuple(branch) if type(branch) is nn.Sequential else (branch,)), None
    return (branch[:-1], branch[-1]) if isinstance(branch[-1], Fork) else (branch, None)


def _outputs(x: Tensor, branches: Sequence[Branch]) -> list[Tensor]:
    found: list[Tensor] = []
    for branch in branches:
        layers, fork = _parts(branch)
        y = run_layers(x, layers)
        found += [y] if fork is None else _outputs(y, fork.branches)
    return found


def _check_sizes(shapes: Sequence[Sequence[int]]) -> None:
    if len({(shape[0], *shape[2:]) for shape in shapes}) != 1:
        found = ", ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"branches: got outputs of shapes {found or 'none'}, expected the same N, H and W in each")


def concat_branches(x: Tensor, branches: Sequence[Branch]) -> Tensor:
    """Every branch's output for x, concatenated along the channels in the branches' order.

    A branch is a module, or layers in their order that run as fused chains (`run_layers`). A last layer ``Fork(branches)``
    fans out once more; its outputs stand side by side with the others', not in a concatenation of their own.

    Shapes: x [N, K, H, W] in any memory format; the result [N, the sum of the branches' channels, P, Q].

    Raises:
        TypeError, ValueError: an input that does not fit a layer, outputs that differ in more than their channels.
    """
    outputs = _outputs(x, branches)
    _check_sizes([y.shape for y in outputs])
    return torch.cat(outputs, 1)


class FoldedBranches(nn.Module):
    """The inference form of branches: each an nn.Sequential, whose last layer may be FoldedBranches again."""

    def __init__(self, branches: Sequence[nn.Sequential]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def _leaves(self, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
        """Every branch's last layer with its input, forks' in their place."""
        found: list[tuple[nn.Module, Tensor]] = []
        for branch in self.branches:
            y = x
            for layer in branch[:-1]:
                y = layer(y)
            last = branch[-1]
            found += last._leaves(y) if isinstance(last, FoldedBranches) else [(last, y)]
        return found

    def forward(self, x: Tensor) -> Tensor:
        """[N, the sum of the branches' channels, P, Q]; chains write their slice of it."""
        leaves = self._leaves(x)
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return self._concatenated(leaves)
        # What is no chain is computed first: only its output tells its shape.
        made = [None if type(layer) is FoldedChain else layer(y) for layer, y in leaves]
        shapes = [
            layer.output_shape(y.shape) if z is None else z.shape for (layer, y), z in zip(leaves, made, strict=True)
        ]
        _check_sizes(shapes)
        n, _, *size = shapes[0]
        empty = memory.empty_nhwc if x.device.type == "cpu" else empty_nhwc
        out, c = empty(n, sum(shape[1] for shape in shapes), *size, like=leaves[0][1]), 0
        for (layer, y), z, shape in zip(leaves, made, shapes, strict=True):
            own = out[:, c : c + shape[1]]
            if z is None:
                layer(y, out=own)
            else:
                torch.ops.fastcnn.affine_act_into(own, z, None, None, 0, None)
            c += shape[1]
        return out

    def _concatenated(self, leaves: list[tuple[nn.Module, Tensor]]) -> Tensor:
        outputs = [layer(y) for layer, y in leaves]
        _check_sizes([y.shape for y in outputs])
        return torch.cat(outputs, 1)


def fold_branches(branches: Sequence[Branch], dtype: torch.dtype | None) -> FoldedBranches | None:
    """The inference form of `concat_branches`, or None where a layer has none."""
    folded: list[nn.Sequential] = []
    for branch in branches:
        layers, fork = _parts(branch)
        parts = [fold_layers(layers, dtype)]
        if fork is not None:
            parts.append(fold_branches(fork.branches, dtype))
        if None in parts:
            return None
        folded.append(nn.Sequential(*parts[0], *parts[1:]))
    return FoldedBranches(folded)


class BranchedModule(nn.Module, ABC):
    """A block that concatenates what its branches make of its input; subclasses say what the branches are."""

    @abstractmethod
    def branches(self) -> Sequence[Branch]:
        """The branches in the order of their channels, read from the submodules at each call."""

    def forward(self, x: Tensor) -> Tensor:
        """The block's output (`concat_branches`).

        Raises:
            TypeError, ValueError: an input that does not fit the block.
        """
        return concat_branches(x, self.branches())

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), or None where a layer has none."""
        return fold_branches(self.branches(), dtype)


class Branches(BranchedModule):
    """Branches under names of one's own, in their order: ``Branches(branch0=..., branch1=...)``.

    A plain nn.Sequential runs as fused chains. Keys: the names, then each branch's own.

    Shapes: x [N, K, H, W] in any memory format; the result [N, the sum of the branches' channels, P, Q].
    Source: GoogLeNet (arXiv 1409.4842, figure 2).

    Raises:
        TypeError, ValueError: an input that does not fit a layer, outputs that differ in more than their channels.
    """

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def branches(self) -> Sequence[Branch]:
        """The named branches."""
        return list(self.children())
