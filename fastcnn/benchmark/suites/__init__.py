"""The benchmarks: each module is a suite with NAME, TITLE, cases(options) and targets(races, options).

A suite that also has curves(options) gets what it returns as targets' further arguments, where all its cases ran.
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import torch

from fastcnn.benchmark.case import Budget, Case
from fastcnn.benchmark.race import CpuClock, Race, RaceResult
from fastcnn.benchmark.suites import capsules, conv2d, dense, depthwise, dropout, models, pointwise, separable
from fastcnn.benchmark.targets import SuiteResult

COMPILE_SECONDS = 100

SUITES: tuple[ModuleType, ...] = (pointwise, depthwise, separable, conv2d, dropout, capsules, dense, models)


@dataclass(frozen=True)
class Options:
    """What to run and how long. `deadline` is a time.monotonic() after which no further case starts."""

    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    quick: bool = False
    only: str | None = None
    budget: Budget = field(default_factory=Budget)
    deadline: float | None = None

    def seconds_left(self) -> float:
        """Until the deadline; infinite without one."""
        return math.inf if self.deadline is None else self.deadline - time.monotonic()

    def compiles(self) -> bool:
        """Whether there is time for torch.compile, whose autotuning on a GPU can take minutes."""
        return not self.quick and self.seconds_left() > COMPILE_SECONDS

    def wants(self, suite: str, case: str) -> bool:
        """Whether `only` (a suite, a part of "suite/case", or a pattern with wildcards) selects the case."""
        if not self.only:
            return True
        if self.only in names():
            return self.only == suite
        name, pattern = f"{suite}/{case}".lower(), self.only.lower()
        return pattern in name or fnmatch.fnmatch(name, pattern)


def selected_cases(options: Options) -> Iterator[tuple[ModuleType, Case]]:
    """Every case that the options ask for, in the suites' order."""
    # On a GPU time is short and the products are torch's own business: they come last.
    for suite in SUITES if options.device == "cpu" else (*SUITES[1:], SUITES[0]):
        for case in suite.cases(options):
            if options.wants(suite.NAME, case.name):
                yield suite, case


def new_clock(device: str) -> CpuClock:
    """The clock for a device."""
    if device == "cpu":
        return CpuClock()
    from fastcnn.benchmark.gpu import GpuClock

    return GpuClock()


def is_whole(suite: ModuleType, races: list[RaceResult], options: Options) -> bool:
    """Whether every case of a suite ran."""
    return len(races) == sum(1 for _ in suite.cases(options))


def is_partial(results: list[SuiteResult], options: Options) -> bool:
    """Whether a suite misses cases: then the run does not replace the machine's summary."""
    by_name = {suite.NAME: suite for suite in SUITES}
    return not all(is_whole(by_name[result.name], result.races, options) for result in results)


def finish(suite: ModuleType, races: list[RaceResult], options: Options) -> SuiteResult:
    """A suite's result: races, curves, and the targets that a whole suite can be held to."""
    curves = suite.curves(options) if hasattr(suite, "curves") and is_whole(suite, races, options) else []
    targets = suite.targets(races, options, *curves)
    return SuiteResult(suite.NAME, suite.TITLE, races, targets, list(suite.NOTES), curves)


def run(options: Options, progress: Callable[[str, RaceResult | None], None]) -> list[SuiteResult]:
    """Runs the selected cases; `progress` hears a case's name before it runs (None) and its result after."""
    by_suite: dict[str, list[RaceResult]] = {}
    late: list[str] = []
    for suite, case in selected_cases(options):
        label = f"{suite.NAME}/{case.name}"
        if options.seconds_left() < 0:
            late.append(label)
            continue
        progress(label, None)
        result = Race(case, options.device, new_clock(options.device)).run(options.budget)
        torch.compiler.reset()  # the next case compiles its own models: keep no guards, no memory of these
        by_suite.setdefault(suite.NAME, []).append(result)
        progress(label, result)
    results = [finish(s, by_suite[s.NAME], options) for s in SUITES if s.NAME in by_suite]
    if late and results:
        results[-1].notes.append(f"Out of time, not run: {', '.join(late)}")
    return results


def names() -> list[str]:
    """The suites' names."""
    return [suite.NAME for suite in SUITES]
