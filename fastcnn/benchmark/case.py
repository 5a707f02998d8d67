"""A piece of work, those who do it, and how long they are timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastcnn.benchmark import peaks

OURS = "fastcnn"


@dataclass(frozen=True)
class Work:
    """Operations of a call, the bytes that it must move at least, and the dtype whose matrix peak counts."""

    operations: float
    traffic: float
    dtype: torch.dtype

    def floor(self, device: str) -> float:
        """Seconds that this machine needs at least."""
        return peaks.floor(self.operations, self.traffic, self.dtype, device)


def tensors_of(output: object) -> tuple[Tensor, ...]:
    """The tensors of an output, without the empty ones that stand for what was not asked for."""
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    return tuple(t for t in outputs if isinstance(t, Tensor) and t.numel())


@dataclass(frozen=True)
class Entry:
    """What a competitor runs, and how its outputs are read after a call (outside the timing)."""

    run: Callable[..., object]
    collect: Callable[[object], Sequence[Tensor]] = tensors_of


@dataclass(frozen=True)
class Competitor:
    """A way to do a case's work. `build` runs once before the race: it compiles, folds and packs."""

    name: str
    dtype: torch.dtype
    build: Callable[[], Entry]
    layout: str = "nhwc"
    takes: torch.dtype | None = None  # the inputs' dtype, where it is not `dtype`
    prepare: Callable[[tuple], tuple] | None = None  # a last view of an input set, outside the timing


@dataclass(frozen=True)
class Case:
    """One piece of work and those who do it. `reference` takes the inputs in float64."""

    name: str
    work: Work
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]
    reference: Callable[..., Sequence[Tensor]]
    competitors: tuple[Competitor, ...]
    count: int = 1
    yardsticks: Mapping[torch.dtype, str] = field(default_factory=dict)
    tags: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """How long a competitor is timed, and how often at least and at most.

    After `max_seconds` a race ends with the round that it is in, however few there were.
    """

    seconds: float = 1.0
    min_rounds: int = 5
    max_rounds: int = 200
    max_seconds: float = math.inf

    @classmethod
    def quick(cls) -> Budget:
        """Enough to see that everything works; too little to believe."""
        return cls(seconds=0.0, min_rounds=2, max_rounds=2)
