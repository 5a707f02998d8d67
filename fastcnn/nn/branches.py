"""Branches over one input whose outputs are concatenated along the channels: Inception's blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcnn.nn.branch_ends import End, concatenated
from fastcnn.nn.branch_paths import Branch, Fork, Path, path, pointwise_start, sharing
from fastcnn.nn.folded_branches import fold_branches
from fastcnn.nn.fused import Unit, check_channels
from fastcnn.nn.sequential import Segment, run_segment
from fastcnn.ops import Conv, conv_chain
from fastcnn.ops.channel_join import is_traced
from fastcnn.ops.shared_pointwise import shared_pointwise

__all__ = ["Branch", "BranchedModule", "Branches", "Fork", "concat_branches"]


def _continued(x: Tensor, units: Sequence[Unit]) -> list[tuple[Tensor, list[Unit]]]:
    """1x1 convolutions of x as one product: of each the output with what is still to be done with it."""
    convs = [unit.convs[0] for unit in units]
    if units[0].norm is not None:
        stats = any(unit.norm.training or unit.norm.running_mean is None for unit in units)
        products = shared_pointwise(x, [conv.weight for conv in convs], stats)
        return [(p.y, [Unit((), u.norm, u.act, statistics=p.statistics)]) for p, u in zip(products, units, strict=True)]
    bias = None if convs[0].bias is None else torch.cat([conv.bias for conv in convs])
    y = conv_chain(x, [Conv("pointwise", (torch.cat([conv.weight for conv in convs]),), act=units[0].act, bias=bias)])
    return [(part, []) for part in y.split([conv.out_channels for conv in convs], 1)]


def _kind(unit: Unit) -> tuple:
    """Convolutions of one kind can be one product: a BatchNorm is applied by what comes next, an activation at once."""
    return (True,) if unit.norm is not None else (False, unit.act, unit.convs[0].bias is None)


def _started(x: Tensor, paths: Sequence[Path]) -> list[tuple[Tensor, list[Segment]]]:
    """Every path's input and segments, after the products that several begin with."""
    found = [(x, each.segments) for each in paths]
    if is_traced(x):
        return found
    for group in sharing(paths, _kind):
        units = [pointwise_start(paths[i]) for i in group]
        for unit in units:
            check_channels(x, unit.convs[0].in_channels)
        for i, (y, begun) in zip(group, _continued(x, units), strict=True):
            first, *rest = paths[i].segments
            found[i] = y, [[*begun, *first[1:]], *rest]
    return found


def _ends(x: Tensor, branches: Sequence[Branch]) -> list[End]:
    """The ends of all branches, forks' in their place."""
    paths = [path(branch) for branch in branches]
    found: list[End] = []
    for (y, (*before, last)), each in zip(_started(x, paths), paths, strict=True):
        for segment in before:
            y = run_segment(y, segment)
        found += [End(y, last)] if each.fork is None else _ends(run_segment(y, last), each.fork.branches)
    return found


def concat_branches(x: Tensor, branches: Sequence[Branch]) -> Tensor:
    """Every branch's output for x, concatenated along the channels in the branches' order.

    A branch is a module, or layers in their order that run as fused chains (`run_layers`). A last layer ``Fork(branches)``
    fans out once more; its outputs stand side by side with the others', not in a concatenation of their own. Chains and
    maximum poolings write their slice of the result, if all outputs are of one dtype; 1x1 convolutions that several branches
    begin with and go on from are one product. Under torch.compile the outputs are concatenated.

    Shapes: x [N, K, H, W] in any memory format; the result [N, the sum of the branches' channels, P, Q].

    Raises:
        TypeError, ValueError: an input that does not fit a layer, outputs that differ in more than their channels.
    """
    return concatenated(_ends(x, branches))


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
