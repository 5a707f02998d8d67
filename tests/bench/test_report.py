"""Targets, means, and what a run leaves behind."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastcnn.benchmark import machine, memory, peaks, report, suites
from fastcnn.benchmark.race import RaceResult
from fastcnn.benchmark.suites import dense
from fastcnn.benchmark.targets import Curve, SuiteResult, Target, geometric_mean, mean_ratio


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "matrix_peak", lambda dtype, device="cpu": 1e11)
    monkeypatch.setattr(peaks, "copy_bandwidth", lambda device="cpu": 1e10)


def _race(name: str, ours: float, peer: float | None, count: int = 1) -> RaceResult:
    rows = {"fastcnn": {"median": ours, "refused": None}, "peer": {"median": peer, "refused": None}}
    if peer is None:
        rows["peer"] = {"refused": "wrong: error 1.0e+00, allowed 1.0e-05"}
    return RaceResult(name, {"dtype": "fp32"}, count, 1e6, 1e6, 1e-3, rows)


def _suite(*races: RaceResult) -> SuiteResult:
    targets = [Target("work", "peer", 1.5, mean_ratio(races)), Target("MB", "torch", 40.0, 30.0, True)]
    return SuiteResult("models", "Whole models", list(races), targets, ["a note"])


def test_geometric_mean_is_weighted() -> None:
    assert geometric_mean([(2.0, 1), (8.0, 1)]) == pytest.approx(4.0)
    assert geometric_mean([(2.0, 3), (32.0, 1)]) == pytest.approx(4.0)
    assert geometric_mean([]) is None


def test_mean_ratio_wants_every_case() -> None:
    assert mean_ratio([_race("a", 1.0, 2.0), _race("b", 1.0, 8.0)]) == pytest.approx(4.0)
    assert mean_ratio([_race("a", 1.0, 2.0), _race("b", 1.0, None)]) is None
    assert mean_ratio([_race("a", 1.0, 2.0)], where=lambda tags: tags["dtype"] == "bf16") is None


def test_target_is_reached_or_not_or_unknown() -> None:
    assert Target("w", "p", 1.5, 1.6).reached
    assert not Target("w", "p", 1.5, 1.4).reached
    assert Target("MB", "p", 40, 30, less_is_better=True).reached
    assert Target("w", "p", 1.5, None).reached is None


def test_whole_run_writes_the_summary_and_a_partial_one_does_not(tmp_path: Path) -> None:
    suite = _suite(_race("a", 1.0, 2.0), _race("b", 1.0, None))
    where = report.save([suite], "cpu", tmp_path, partial=True)
    assert where.is_relative_to(tmp_path / "raw")
    assert not (tmp_path / "results").exists()
    summary = report.save([suite], "cpu", tmp_path)
    text = summary.read_text()
    assert summary == tmp_path / "results" / f"{machine.slug(machine.describe())}.md"
    assert "| work | peer | ≥ 1.5 | – | not measured |" in text
    assert "| MB | torch | ≤ 40 | 30.00 | yes |" in text
    assert "Refused: peer: wrong" in text
    if importlib.util.find_spec("matplotlib"):
        assert next((tmp_path / "raw").glob("*/models.png")).stat().st_size > 1000


def test_record_names_machine_versions_and_commit() -> None:
    data = json.loads(json.dumps(report.record(_suite(_race("a", 1.0, 2.0)), "cpu", False)))
    assert data["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"cpu", "commit", "threads", "cores", "date", "cpu_kernels"} <= data["machine"].keys()
    assert data["peaks"]["matrix_ops_per_s"]["float32"] == 1e11
    assert SuiteResult.from_dict(data["suite"]).races[0].ratio_to_best() == 2.0


def _curve(**series: list[float | None]) -> Curve:
    return Curve("memory", "Peak memory", "layers", "MB", [8, 16, 32, 64], series)


def test_curves_are_kept_and_shown_in_the_summary(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curve = _curve(ours=[1.0, 2.0, 4.0, 8.0], torch=[2.0, None, 20.0, 70.0], unknown=[None] * 4)
    suite = SuiteResult(
        "dense", "Dense blocks", curves=[curve, Curve("nothing", "Nothing", "x", "y", [1], {"a": [None]})]
    )
    data = json.loads(json.dumps(suite.as_dict()))
    assert SuiteResult.from_dict(data) == suite
    del data["curves"]
    assert SuiteResult.from_dict(data).curves == []
    where = report.save([suite], "cpu", tmp_path, partial=True)
    assert (where / "dense-memory.png").stat().st_size > 1000
    summary = report.save([suite], "cpu", tmp_path)
    picture = summary.with_name(f"{summary.stem}-dense-memory.png")
    assert 1000 < picture.stat().st_size <= 40 << 10
    assert f"![Peak memory]({picture.name})" in summary.read_text()
    assert sorted(summary.parent.iterdir()) == sorted([summary, picture])


def test_targets_are_of_the_curves_that_were_measured() -> None:
    measured = []

    def curves(options: suites.Options) -> list[Curve]:
        measured.append(_curve(a=[1.0, 2.0, 3.0, 4.0]))
        return measured[-1:]

    def targets(races: list[RaceResult], options: suites.Options, curve: Curve) -> list[Target]:
        return [Target("last", "", 4.0, curve.series["a"][-1])]

    suite = SimpleNamespace(NAME="s", TITLE="S", NOTES=(), cases=lambda _: (), curves=curves, targets=targets)
    result = suites.finish(suite, [], suites.Options())
    assert result.curves == measured
    assert len(measured) == 1
    assert result.targets == [Target("last", "", 4.0, 4.0)]


def test_a_part_of_a_suite_measures_no_curve() -> None:
    def curves(options: suites.Options) -> list[Curve]:
        raise AssertionError("measured")

    suite = SimpleNamespace(
        NAME="s", TITLE="S", NOTES=(), cases=lambda _: ("a case",), curves=curves, targets=lambda *_: []
    )
    assert suites.finish(suite, [], suites.Options()).curves == []


def test_memory_of_a_dense_block_is_to_grow_linearly() -> None:
    names = ("fastcnn", "fastcnn, memory_efficient", "torch", "torch, memory_efficient")
    values = ([8.0, 16.0, 41.0, 64.0], [4.0, 8.0, 16.0, None], [30.0, 90.0, 290.0, 990.0], [9.0, 18.0, 36.0, 72.0])
    found = dense.targets([], suites.Options(), _curve(**dict(zip(names, values, strict=True))))
    assert [t.bound for t in found] == [20.0, 40.0, 80.0, 10.0, 20.0]
    assert [t.reached for t in found] == [True, False, True, True, True]
    assert found[1].work == "block of 32 layers, fast, peak of a step"
    assert found[1].against == "MB; 290 in torch's"
    assert dense.curves(suites.Options(quick=True)) == dense.targets([], suites.Options(quick=True)) == []


def _where() -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def test_in_new_process_runs_with_as_many_threads() -> None:
    process, threads = memory.in_new_process(_where)
    assert process != os.getpid()
    assert threads == torch.get_num_threads()


def test_saved_bytes_counts_each_storage_once_and_no_parameter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    # The convolution keeps its input, the ReLU its output.
    assert memory.saved_bytes(model, lambda: model(x)) == 4 * 2 * 8 * 8 * (3 + 4)


def test_peak_bytes_sees_what_a_call_holds() -> None:
    size = 64 << 20
    peak = memory.peak_bytes(lambda: torch.ones(size // 4))
    if peak is None:
        pytest.skip("this system does not tell the resident set's peak")
    assert 0.9 * size < peak < 2 * size


def test_machine_slug_is_a_file_name() -> None:
    facts = {"cpu": "Intel(R) Xeon(R) Processor @ 2.60GHz", "features": ["avx512f", "amx_bf16"], "threads": 2}
    assert machine.slug(facts) == "intel-xeon-2-60ghz-amx-bf16-2-threads"


def test_a_suites_name_selects_its_cases_alone() -> None:
    names = {suite.NAME for suite, _ in suites.selected_cases(suites.Options(only="dense"))}
    assert names == {"dense"}
    several = {suite.NAME for suite, _ in suites.selected_cases(suites.Options(only="densenet121"))}
    assert several == {"models"}


def test_a_run_is_partial_where_a_suite_misses_cases() -> None:
    options = suites.Options()
    races = [_race(case.name, 1.0, 2.0) for case in dense.cases(options)]
    whole = SuiteResult(dense.NAME, dense.TITLE, races)
    assert not suites.is_partial([whole], options)
    assert suites.is_partial([whole, SuiteResult(dense.NAME, dense.TITLE, races[1:])], options)
