"""Branches over one input whose outputs are concatenated along the channels: Inception's blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcnn.nn.sequential import fold_layers, run_layers


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


def _concatenated(outputs: Sequence[Tensor]) -> Tensor:
    if len({(y.shape[0], *y.shape[2:]) for y in outputs}) != 1:
        shapes = ", ".join(str(list(y.shape)) for y in outputs)
        raise ValueError(f"branches: got outputs of shapes {shapes or 'none'}, expected the same N, H and W in each")
    return torch.cat(outputs, 1)


def concat_branches(x: Tensor, branches: Sequence[Branch]) -> Tensor:
    """Every branch's output for x, concatenated along the channels in the branches' order.

    A branch is a module, or layers in their order that run as fused chains (`run_layers`). A last layer ``Fork(branches)``
    fans out once more; its outputs stand side by side with the others', not in a concatenation of their own.

    Shapes: x [N, K, H, W] in any memory format; the result [N, the sum of the branches' channels, P, Q].

    Raises:
        TypeError, ValueError: an input that does not fit a layer, outputs that differ in more than their channels.
    """
    return _concatenated(_outputs(x, branches))


class FoldedBranches(nn.Module):
    """The inference form of branches: each an nn.Sequential, whose last layer may be FoldedBranches again."""

    def __init__(self, branches: Sequence[nn.Sequential]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def outputs(self, x: Tensor) -> list[Tensor]:
        """What the branches make of x, forks' in their place."""
        found: list[Tensor] = []
        for branch in self.branches:
            y = x
            for layer in branch:
                y = layer.outputs(y) if isinstance(layer, FoldedBranches) else layer(y)
            found += y if isinstance(y, list) else [y]
        return found

    def forward(self, x: Tensor) -> Tensor:
        """[N, the sum of the branches' channels, P, Q]."""
        return _concatenated(self.outputs(x))


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
