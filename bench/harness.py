"""The pytest side of the benchmarks: a case is a test; the peers take turns with pytest-benchmark's rounds.

Checks, peers and reports are fastcnn.benchmark's, in the package because `fastcnn bench` runs the same cases
where there is no checkout. pytest-benchmark times our own way; before each of its rounds the peers run.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from types import ModuleType

import pytest
import torch

from fastcnn.benchmark.case import OURS, Case
from fastcnn.benchmark.race import Race, RaceResult
from fastcnn.benchmark.suites import Options, new_clock

# pytest escapes what is not ASCII in a test's name.
ASCII = str.maketrans({"×": "x", "²": "px", "→": "-"})
ROUNDS, QUICK_ROUNDS = 10, 2
RESULTS: dict[str, list[RaceResult]] = {}


def options(config: pytest.Config) -> Options:
    """What the command line asked for."""
    gpu, quick = config.getoption("--gpu"), config.getoption("--quick")
    return Options(device="cuda", dtypes=(torch.bfloat16,), quick=quick) if gpu else Options(quick=quick)


def parametrize(metafunc: pytest.Metafunc, suite: ModuleType) -> None:
    """A test for each of a suite's cases."""
    cases: Iterable[Case] = suite.cases(options(metafunc.config))
    metafunc.parametrize("case", [pytest.param(case, id=case.name.translate(ASCII)) for case in cases])


def run(benchmark, case: Case, suite: ModuleType, config: pytest.Config) -> RaceResult:
    """Races a case's competitors; fails where our own result is wrong."""
    chosen = options(config)
    race = Race(case, chosen.device, new_clock(chosen.device))
    race.start()
    ours = race.entrant(OURS)
    if ours.refused:
        pytest.fail(ours.refused)
    peers = [e.competitor.name for e in race.runners() if e is not ours]

    def turn() -> tuple[tuple, dict]:
        """The peers' turns, then one untimed call of ours and the arguments of the timed one."""
        for name in peers:
            race.lap(name)
        ours.entry.run(*ours.next_set())
        return ours.next_set(), {}

    def call(*args: torch.Tensor) -> object:
        output = ours.entry.run(*args)
        if chosen.device == "cuda":
            torch.cuda.synchronize()
        return output

    benchmark.pedantic(call, setup=turn, rounds=QUICK_ROUNDS if chosen.quick else ROUNDS)
    # On a GPU the host's clock is not the kernels': their times come from our own turn.
    ours.samples = list(benchmark.stats.stats.data) if chosen.device == "cpu" else race.clock.lap(ours)
    result = race.result()
    torch.compiler.reset()
    benchmark.extra_info |= _extra(race, result)
    RESULTS.setdefault(suite.NAME, []).append(result)
    return result


def _extra(race: Race, result: RaceResult) -> dict:
    medians = {e.competitor.name: statistics.median(e.samples) for e in race.entrants if e.samples}
    refused = {e.competitor.name: e.refused for e in race.entrants if e.refused}
    return {
        "median_s": medians,
        "refused": refused,
        "ratio_to_best_peer": result.ratio_to_best(),
        "fraction_of_floor": result.fraction_of_floor(),
    }
