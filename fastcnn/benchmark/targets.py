"""What a suite was asked to reach, beside what it measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

from fastcnn.benchmark.race import RaceResult


@dataclass(frozen=True)
class Target:
    """A figure to reach: at least `bound`, or at most it where less is better."""

    work: str
    against: str
    bound: float
    measured: float | None
    less_is_better: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether it is; None where nothing was measured."""
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.less_is_better else self.measured >= self.bound


@dataclass(frozen=True)
class Curve:
    """How figures grow with x: the values of each series at every x, None where nothing was measured."""

    name: str
    title: str
    x_label: str
    y_label: str
    x: list[float]
    series: dict[str, list[float | None]]


@dataclass
class SuiteResult:
    """A suite's races, targets and curves."""

    name: str
    title: str
    races: list[RaceResult] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def as_dict(self) -> dict:
        """Ready for JSON."""
        targets = [asdict(t) | {"reached": t.reached} for t in self.targets]
        return asdict(self) | {"targets": targets}

    @classmethod
    def from_dict(cls, data: dict) -> SuiteResult:
        """The inverse of as_dict."""
        targets = [Target(**{k: v for k, v in t.items() if k != "reached"}) for t in data["targets"]]
        races = [RaceResult(**r) for r in data["races"]]
        curves = [Curve(**c) for c in data.get("curves", ())]  # records of before there were any stay readable
        return cls(data["name"], data["title"], races, targets, data["notes"], curves)


def geometric_mean(values: Iterable[tuple[float, int]]) -> float | None:
    """Of (value, how often it counts); None of nothing."""
    values = list(values)
    weight = sum(count for _, count in values)
    return math.exp(sum(count * math.log(value) for value, count in values) / weight) if weight else None


def mean_ratio(
    races: Iterable[RaceResult],
    peers: Sequence[str] | None = None,
    where: Callable[[dict], bool] = lambda tags: True,
) -> float | None:
    """The geometric mean, over the races whose tags fit, of the ratio to the fastest of the peers.

    None as soon as one of them has no ratio: a mean over what happened to work would flatter.
    """
    ratios = [(race.ratio_to_best(peers), race.count) for race in races if where(race.tags)]
    return None if any(r is None for r, _ in ratios) else geometric_mean(ratios)
