"""The inference form of branches: chains that write their slice of the concatenation, and one product for many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcnn.nn.branch_ends import End, concatenated
from fastcnn.nn.branch_paths import Branch, Path, path, pointwise_start, sharing
from fastcnn.nn.folded import FoldedChain, fold
from fastcnn.nn.fused import convolutions, is_foldable, op_of
from fastcnn.nn.sequential import fold_segments
from fastcnn.ops import Affine, Conv

Place = tuple[int, int] | None


class FoldedBranches(nn.Module):
    """The inference form of branches: each an nn.Sequential, whose last layer may be FoldedBranches again.

    Args:
        branches: the branches.
        shared: a chain over the input from whose output some of them go on, or None.
        places: for each branch its channels of that output (first, last), or None where it reads the input.
    """

    def __init__(self, branches: Sequence[nn.Sequential], shared: FoldedChain | None, places: Sequence[Place]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.shared, self.places = shared, tuple(places)

    def _ends(self, x: Tensor) -> list[End]:
        """The ends of all branches, forks' in their place."""
        found: list[End] = []
        shared = None if self.shared is None else self.shared(x)
        for branch, place in zip(self.branches, self.places, strict=True):
            y = x if place is None else shared[:, slice(*place)]
            for layer in branch[:-1]:
                y = layer(y)
            last = branch[-1]
            found += last._ends(y) if isinstance(last, FoldedBranches) else [End(y, last)]
        return found

    def forward(self, x: Tensor) -> Tensor:
        """[N, the sum of the branches' channels, P, Q]; chains and poolings write their slice of it."""
        return concatenated(self._ends(x))


def _goes_on(of: Path) -> bool:
    """Whether a general convolution follows the first: alone, its output is a slice of the concatenation already."""
    units = of.segments[0][1:2]
    return bool(units) and len(units[0].convs) == 1 and op_of(units[0].convs[0]) == "conv2d"


def _shared_start(paths: Sequence[Path], dtype: torch.dtype | None) -> tuple[FoldedChain | None, list[Place]]:
    """The product that several paths begin with, and their places in its output."""
    places: list[Place] = [None] * len(paths)
    groups = sharing(paths, lambda unit: unit.act if is_foldable([unit]) else None)
    group = [i for i in max(groups, key=len, default=[]) if _goes_on(paths[i])]
    units = [pointwise_start(paths[i]) for i in group]
    if len(group) < 2 or not is_foldable(units):
        return None, places
    weights, shifts = zip(*(fold(conv, torch.float64) for conv in convolutions(units, frozen=True)), strict=True)
    first = 0
    for i, (weight,) in zip(group, weights, strict=True):
        places[i] = first, first + len(weight)
        first += len(weight)
    shifts = [w.new_zeros(len(w)) if shift is None else shift for (w,), shift in zip(weights, shifts, strict=True)]
    product = Conv(
        "pointwise", (torch.cat([w for (w,) in weights]),), norm=Affine(None, torch.cat(shifts)), act=units[0].act
    )
    return FoldedChain([product], dtype=dtype or units[0].convs[0].weight.dtype), places


def fold_branches(branches: Sequence[Branch], dtype: torch.dtype | None) -> FoldedBranches | None:
    """The inference form of `concat_branches`, or None where a layer has none."""
    paths = [path(branch) for branch in branches]
    shared, places = _shared_start(paths, dtype)
    folded: list[nn.Sequential] = []
    for each, place in zip(paths, places, strict=True):
        parts = [fold_segments((each if place is None else each.after_first_unit()).segments, dtype)]
        if each.fork is not None:
            parts.append(fold_branches(each.fork.branches, dtype))
        if None in parts:
            return None
        folded.append(nn.Sequential(*parts[0], *parts[1:]))
    return FoldedBranches(folded, shared, places)
