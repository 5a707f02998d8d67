"""In which order an epoch shows the images, and one random number for each: functions of the seed and the epoch alone.

So a resumed run, a second model and any number of processes or workers see the same images, cut the same way.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def derived_seed(*parts: object) -> int:
    """A 32-bit seed for a purpose: torch's CPU generator uses no more bits, and sums of small numbers would collide."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


@dataclass(frozen=True)
class Order:
    """An endless plan for a training set, of which each process takes its part of every batch.

    Args:
        images: in the training set.
        batch: images per step, of all processes together.
        seed: the run's.
        limit_steps: at most so many steps per epoch.
        rank, size: this process, and how many there are.

    Raises:
        ValueError: a batch that is larger than the set or does not divide among the processes.
    """

    images: int
    batch: int
    seed: int
    limit_steps: int | None = None
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if self.batch > self.images:
            raise ValueError(f"batch: got {self.batch}, expected at most the {self.images} images of the training set")
        if self.batch % self.size:
            raise ValueError(f"batch: got {self.batch}, expected a multiple of the {self.size} processes")

    @property
    def steps(self) -> int:
        """Steps per epoch; images that do not fill the last batch wait for another epoch's order."""
        return min(self.images // self.batch, self.limit_steps or self.images)

    def epoch(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """This process's part of each step: indices [n] and random numbers [n] of 62 bits, int64."""
        generator = torch.Generator().manual_seed(derived_seed("order", self.seed, epoch))
        indices = torch.randperm(self.images, generator=generator)[: self.steps * self.batch]
        numbers = torch.randint(2**62, (len(indices),), generator=generator)
        shape = (self.steps, self.size, self.batch // self.size)
        return list(zip(indices.view(shape)[:, self.rank], numbers.view(shape)[:, self.rank]))

    def test_batches(self, images: int) -> list[Tensor]:
        """This process's batches of a test set's indices; every image is in one process's."""
        return list(torch.arange(images).split(self.batch))[self.rank :: self.size]
