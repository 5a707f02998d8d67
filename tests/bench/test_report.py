"""Targets, means, and what a run leaves behind."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastcnn.benchmark import machine, memory, peaks, report
from fastcnn.benchmark.race import RaceResult
from fastcnn.benchmark.targets import SuiteResult, Target, geometric_mean, mean_ratio


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
