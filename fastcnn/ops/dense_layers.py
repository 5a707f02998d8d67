"""What a dense block is given, and what its forward hands to its backward, whoever runs its layers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastcnn.ops.normalisation import BatchNorm, Kind


class DenseLayer(NamedTuple):
    """One layer: weight1 [M, prefix, 1, 1] and weight2 [growth, M, 3, 3], each after its normalisation and ReLU."""

    norm1: BatchNorm
    weight1: Tensor
    norm2: BatchNorm
    weight2: Tensor


class Dropout(NamedTuple):
    """Inverted dropout of each layer's output: p, scale and unit (dropout.distribution), and each layer's key [2]."""

    how: tuple[float, float, int]
    keys: tuple[Tensor, ...] = ()


class Stage(NamedTuple):
    """A layer's tensors."""

    weight1: Tensor
    scale1: Tensor | None
    shift1: Tensor | None
    mean1: Tensor | None
    var1: Tensor | None
    weight2: Tensor
    scale2: Tensor | None
    shift2: Tensor | None
    mean2: Tensor | None
    var2: Tensor | None


SLOTS = len(Stage._fields)


class Block(NamedTuple):
    """A block without its tensors: each layer's two normalisations, its dropout, and whether 1x1 outputs are kept."""

    kinds: tuple[tuple[Kind, Kind], ...]
    drop: Dropout
    keeps: bool = True

    @property
    def trains(self) -> bool:
        """Whether some normalisation takes the batch's statistics."""
        return any(kind.trains for pair in self.kinds for kind in pair)

    @property
    def shares(self) -> bool:
        """Whether layers read the slices' statistics: only a layer's first normalisation does."""
        return any(kind1.trains for kind1, _ in self.kinds)

    @property
    def group(self):
        """The processes that the batch belongs to, or None."""
        return next((k.group for pair in self.kinds for k in pair if k.trains), None)


class Written(NamedTuple):
    """What a block's forward made.

    Attributes:
        out: the buffer [N, K + layers * growth, H, W].
        shared: mean and variance of its channels, or None where no layer reads them.
        own: mean and variance of the 1x1 outputs whose normalisation takes them, one after the other, or None.
        count: the values of a channel that the statistics are of, those of all processes.
        saved: what the backward of the same implementation needs.
    """

    out: Tensor
    shared: tuple[Tensor, Tensor] | None
    own: tuple[Tensor, Tensor] | None
    count: int | Tensor
    saved: list[Tensor | None]
