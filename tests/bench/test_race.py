"""The harness refuses what is wrong, takes turns, and computes medians, ratios and floors."""

from __future__ import annotations

import math

import pytest
import torch

from fastcnn.benchmark import machine, peaks, race
from fastcnn.benchmark.case import Budget, Case, Competitor, Entry, Work
from fastcnn.benchmark.check import FINITE, TOLERANCES, allowed_errors, relative_errors
from fastcnn.benchmark.race import Race, RaceResult

F32 = torch.float32


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "matrix_peak", lambda dtype, device="cpu": 1e9)
    monkeypatch.setattr(peaks, "copy_bandwidth", lambda device="cpu": 1e8)
    monkeypatch.setattr(machine, "last_level_cache", lambda device="cpu": 1 << 16)


def _competitor(name: str, function, dtype: torch.dtype = F32) -> Competitor:
    return Competitor(name, dtype, lambda: Entry(function))


def _case(*competitors: Competitor, **options) -> Case:
    return Case(
        "double", Work(1e6, 1e6, F32), lambda g: (torch.randn(64, 64, generator=g),), lambda x: (2 * x,),
        competitors, **options,
    )  # fmt: skip


def test_wrong_competitor_is_refused_and_not_timed() -> None:
    case = _case(_competitor("fastcnn", lambda x: 2 * x), _competitor("peer", lambda x: 2.001 * x))
    result = Race(case).run(Budget.quick())
    assert result.rows["peer"]["refused"].startswith("wrong: error 5.0e-04")
    assert result.median("peer") is None
    assert result.median("fastcnn") > 0
    assert result.ratio("peer") is None
    assert result.ratio_to_best() is None


@pytest.mark.parametrize(
    "function",
    [lambda x: x * math.nan, lambda x: 2 * x[:1], lambda x: (2 * x, x)],
    ids=["nan", "shape", "number"],
)
def test_bad_outputs_are_refused(function) -> None:
    result = Race(_case(_competitor("fastcnn", function))).run(Budget.quick())
    assert result.rows["fastcnn"]["refused"].startswith("wrong")


def test_competitor_that_cannot_be_built_or_raises_does_not_end_the_race() -> None:
    def absent() -> Entry:
        raise ImportError("No module named 'openvino'")

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("boom")

    case = _case(
        _competitor("fastcnn", lambda x: 2 * x),
        Competitor("absent", F32, absent),
        _competitor("broken", broken),
    )
    rows = Race(case).run(Budget.quick()).rows
    assert rows["absent"]["refused"] == "not available: ImportError: No module named 'openvino'"
    assert rows["broken"]["refused"] == "failed: RuntimeError: boom"
    assert rows["fastcnn"]["median"] > 0


def test_turns_are_interleaved_and_inputs_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "LAP_SECONDS", 0.0)
    monkeypatch.setattr(race, "WARM_BELOW", 0.0)
    calls = []

    def recorded(name: str):
        return lambda x: calls.append((name, x.data_ptr())) or 2 * x

    Race(_case(_competitor("a", recorded("a")), _competitor("b", recorded("b")))).run(Budget(0.0, 3, 3))
    names = "".join(name for name, _ in calls)
    assert names == "ab" + "ab" + "ababab"  # the check, the estimate, three rounds
    pointers = [pointer for name, pointer in calls if name == "a"][1:]
    assert all(x != y for x, y in zip(pointers, pointers[1:]))


def test_input_sets_exceed_the_last_level_cache() -> None:
    sets = race.input_sets(_case(), "cpu")
    assert sum(t.numel() * 4 for s in sets for t in s) > machine.last_level_cache()
    assert not torch.equal(sets[0][0], sets[1][0])


def _result(**medians: float) -> RaceResult:
    return RaceResult("case", {}, 1, 1e6, 1e6, 0.5, {name: {"median": m} for name, m in medians.items()})


def test_ratios_and_fraction_of_floor() -> None:
    result = _result(fastcnn=2.0, slow=6.0, fast=3.0)
    assert result.ratio("slow") == 3.0
    assert result.ratio_to_best() == 1.5
    assert result.ratio_to_best(["slow"]) == 3.0
    assert result.fraction_of_floor() == 0.25
    assert result.peers() == ["slow", "fast"]


def test_our_better_way_counts() -> None:
    assert _result(**{"fastcnn": 2.0, "fastcnn packed": 1.0, "peer": 3.0}).ratio("peer") == 3.0


def test_floor_is_the_larger_of_computing_and_moving() -> None:
    assert Work(1e9, 1.0, F32).floor("cpu") == 1.0
    assert Work(1.0, 1e9, F32).floor("cpu") == 10.0


def test_median_of_the_samples() -> None:
    entrant = race.Entrant(_competitor("a", None), samples=[5.0, 1.0, 2.0])
    row = race._row(entrant)
    assert (row["median"], row["best"], row["samples"]) == (2.0, 1.0, 3)


def test_relative_error_is_of_the_norm() -> None:
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_errors([torch.tensor([3.0, 4.5])], [reference]) == [pytest.approx(0.1)]
    assert relative_errors([], [reference]) == [math.inf]


def test_yardstick_allows_twice_its_own_error_and_no_more() -> None:
    assert allowed_errors(F32, 1, None) == [TOLERANCES[F32]]
    assert allowed_errors(F32, 1, [1e-3]) == [2e-3]
    assert allowed_errors(F32, 1, [1e-9]) == [TOLERANCES[F32]]
    # An output on which stock torch itself is lost judges nobody; a case needs one on which it is not.
    assert allowed_errors(F32, 2, [1e-3, 1.0]) == [2e-3, FINITE]
    assert allowed_errors(F32, 1, [1.0]) == [TOLERANCES[F32]]
    assert math.inf > FINITE


def test_budget_of_a_quick_run() -> None:
    case = _case(_competitor("fastcnn", lambda x: 2 * x))
    shares: list[float] = []
    Race(case).run(Budget.quick(), shares.append)
    assert len(shares) == 2
    assert shares == sorted(shares)


def test_race_ends_in_time() -> None:
    case = _case(_competitor("fastcnn", lambda x: 2 * x))
    shares: list[float] = []
    Race(case).run(Budget(seconds=0.0, min_rounds=100, max_seconds=0.0), shares.append)
    assert len(shares) == 1
