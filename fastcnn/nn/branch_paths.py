"""What branches are made of: layers one after the other, in segments, and which of them begin with one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from fastcnn.nn.fused import Unit, op_of
from fastcnn.nn.sequential import Segment, segments


class Fork(NamedTuple):
    """Branches that all read what the layers before them made: the last entry of a branch that fans out."""

    branches: Sequence[Branch]


# A module, or layers in their order; the last may be a Fork.
Branch = nn.Module | Sequence[nn.Module | Fork]


class Path(NamedTuple):
    """A branch as segments (`sequential.segments`), at least one, and the fork after them."""

    segments: list[Segment]
    fork: Fork | None

    def after_first_unit(self) -> Path:
        """The path without the first convolution of its first segment, a chain of several."""
        first, *rest = self.segments
        return self._replace(segments=[first[1:], *rest])


def path(branch: Branch) -> Path:
    """A branch's path; the layers of a plain nn.Sequential are taken one by one."""
    fork = None
    if isinstance(branch, nn.Module):
        branch = tuple(branch) if type(branch) is nn.Sequential else (branch,)
    elif isinstance(branch[-1], Fork):
        branch, fork = branch[:-1], branch[-1]
    return Path(segments(branch) or [nn.Identity()], fork)


def pointwise_start(of: Path) -> Unit | None:
    """The convolution that a path begins with, where it can be a part of a wider product: 1x1 over every pixel.

    Without a BatchNorm, which the path applies, only where the chain goes on: what it ends in is stored where it belongs.
    """
    first = of.segments[0]
    if isinstance(first, nn.Module) or len(first[0].convs) != 1 or (first[0].norm is None and len(first) == 1):
        return None
    conv = first[0].convs[0]
    if op_of(conv) != "pointwise" or conv.stride != (1, 1) or (first[0].norm is not None and conv.bias is not None):
        return None
    return first[0]


def sharing(paths: Sequence[Path], kind: Callable[[Unit], object]) -> list[list[int]]:
    """Which paths may begin with one product: those whose first units are of one kind, where there are several."""
    groups: dict[object, list[int]] = {}
    for i, each in enumerate(paths):
        unit = pointwise_start(each)
        if unit is not None:
            groups.setdefault(kind(unit), []).append(i)
    return [group for group in groups.values() if len(group) > 1]
