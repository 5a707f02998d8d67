"""What a dense block is given, and what its forward hands to its backward, whoever runs its layers."""

from __future__ import annotations

from collections.abc import Sequence
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


class Saved(NamedTuple):
    """What a block's backward needs of its forward. Whoever repeats the forward finds the same tensors to save.

    Attributes:
        buffer: the output.
        mean: the batch's mean of its channels, or None where no layer reads it.
        maps: each normalisation as the map that it is, [4, channels] (`normalisation.Applied`), in one tensor: each layer's
            first, then its second.
        mids: the layers' 1x1 outputs, None where they are made again.
        weights: each layer's two.
    """

    buffer: Tensor
    mean: Tensor | None
    maps: Tensor
    mids: list[Tensor | None]
    weights: list[tuple[Tensor, Tensor]]

    def tensors(self) -> list[Tensor | None]:
        """All of them, for `of`."""
        return [self.buffer, self.mean, self.maps, *self.mids, *(w for pair in self.weights for w in pair)]

    @staticmethod
    def of(tensors: Sequence[Tensor | None]) -> Saved:
        """From its tensors."""
        buffer, mean, maps, *rest = tensors
        layers = len(rest) // 3
        weights = list(zip(rest[layers::2], rest[layers + 1 :: 2], strict=True))
        return Saved(buffer, mean, maps, rest[:layers], weights)

    @property
    def growth(self) -> int:
        """Channels of a slice."""
        return self.weights[0][1].shape[0]

    def reads(self) -> list[int]:
        """How many channels each layer reads."""
        channels, growth = self.weights[0][0].shape[1], self.growth
        return [channels + growth * i for i in range(len(self.weights))]


class Written(NamedTuple):
    """What a block's forward made.

    Attributes:
        out: the buffer [N, K + layers * growth, H, W].
        shared: mean and variance of its channels, or None where no layer reads them.
        own: mean and variance of the 1x1 outputs whose normalisation takes them, one after the other, or None.
        count: the values of a channel that the statistics are of, those of all processes.
        saved: what a backward needs, whoever runs it (`Saved`).
    """

    out: Tensor
    shared: tuple[Tensor, Tensor] | None
    own: tuple[Tensor, Tensor] | None
    count: int | Tensor
    saved: Saved
