"""The command line: help, bad input in one line, and each command once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fastcnn
from fastcnn import cli
from fastcnn.benchmark import peaks, stock


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "matrix_peak", lambda dtype, device="cpu": 1e11)
    monkeypatch.setattr(peaks, "copy_bandwidth", lambda device="cpu": 1e10)


@pytest.fixture
def same_threads() -> Iterator[None]:
    """Puts torch's number of threads back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _fails(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one line on stderr of a command that must exit with 2."""
    assert cli.main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("command", [(), ("demo",), ("train",), ("bench",), ("explain",), ("doctor",)])
def test_help(command: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--help"])
    assert exit_.value.code == 0
    assert "usage: fastcnn" in capsys.readouterr().out


def test_module_runs() -> None:
    run = subprocess.run([sys.executable, "-m", "fastcnn", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"fastcnn {fastcnn.__version__}"


@pytest.mark.parametrize("argv", [(), ("dance",), ("bench", "--seconds", "soon"), ("explain",)])
def test_usage_errors_exit_with_two(argv: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    assert "usage: fastcnn" in capsys.readouterr().err


def test_explain_unknown_model(capsys: pytest.CaptureFixture) -> None:
    line = _fails(capsys, "explain", "mobilenet_v9")
    assert "got 'mobilenet_v9'" in line
    assert "mobilenet_v2" in line


@pytest.mark.parametrize("option", ["--batch", "--size"])
def test_explain_bad_number(option: str, capsys: pytest.CaptureFixture) -> None:
    assert f"{option}: got 0" in _fails(capsys, "explain", "mobilenet_v2", option, "0")


def test_explain_forced_backend_that_cannot_run(capsys: pytest.CaptureFixture, known_machine: None) -> None:
    with fastcnn.backends.force("cuda"):
        assert "'cuda' was forced" in _fails(capsys, "explain", "mobilenet_v2", "--size", "64")


def test_explain_prints_a_row_per_layer(capsys: pytest.CaptureFixture, known_machine: None) -> None:
    assert cli.main(["explain", "mobilenet_v2", "--size", "64", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    blocks = [r for r in rows if r["op"] in ("separable_fwd", "inverted_residual_fwd")]
    assert len(blocks) == 17
    assert all(r["operations"] > 0 and r["bytes"] > 0 and r["floor"] > 0 for r in blocks)
    assert {r["backend"] for r in rows} <= {*fastcnn.backends.BACKENDS, "torch"}
    assert cli.main(["explain", "mobilenet_v2", "--size", "64"]) == 0
    assert "inverted_residual_fwd" in capsys.readouterr().out


def test_bench_bad_input(capsys: pytest.CaptureFixture) -> None:
    assert "--threads: got 0" in _fails(capsys, "bench", "--threads", "0")
    assert "--only: got 'nonsense'" in _fails(capsys, "bench", "--only", "nonsense", "--quick")
    if not torch.cuda.is_available():
        assert "no CUDA device" in _fails(capsys, "bench", "--gpu")


def test_bench_lists_its_cases(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", "--list", "--only", "pointwise"]) == 0
    assert "pointwise/2048×2048×2048 bf16" in capsys.readouterr().out.splitlines()


def test_quick_bench_writes_json_and_no_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture, known_machine: None
) -> None:
    file = tmp_path / "all.json"
    argv = [
        "bench",
        "--quick",
        "--only",
        "pointwise/392*fp32",
        "--json",
        str(file),
        "--output",
        str(tmp_path),
    ]
    assert cli.main(argv) == 0
    assert "torch linear" in capsys.readouterr().out
    (suite,) = json.loads(file.read_text())
    assert suite["quick"]
    assert suite["suite"]["races"][0]["rows"]["fastcnn"]["median"] > 0
    assert not (tmp_path / "results").exists()


def test_doctor_runs(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["doctor"]) in (0, 1)
    assert "torch" in capsys.readouterr().out


# --- demo ---


def test_demo_names_the_file_that_is_no_image(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    file = tmp_path / "notes.png"
    file.write_text("not a picture")
    assert f"{file}: cannot be read as an image" in _fails(capsys, "demo", str(file))
    assert "absent.jpg: cannot be read as an image" in _fails(capsys, "demo", "absent.jpg")


def test_demo_bad_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "expected NAME=PATH" in _fails(capsys, "demo", "--weights", "resnet50=x.pth")
    assert "no file 'absent.pth'" in _fails(capsys, "demo", "--weights", "xception=absent.pth")
    pytest.importorskip("torchvision")
    file = tmp_path / "empty.pth"
    torch.save({}, file)
    line = _fails(capsys, "demo", "--model", "mobilenet_v2", "--weights", f"mobilenet_v2={file}")
    assert "empty.pth: not weights of MobileNetV2" in line


def test_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "pip install 'fastcnn[demo]'" in _fails(capsys, "demo", "--model", "mobilenet_v2")


@pytest.mark.slow
@pytest.mark.usefixtures("known_machine", "same_threads")
def test_quick_demo(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for package in ("torchvision", "skimage", "matplotlib"):
        pytest.importorskip(package)
    file = tmp_path / "figures.json"
    argv = ["demo", "--quick", "--model", "mobilenet_v2", "--threads", "1"]
    assert cli.main([*argv, "--output", str(tmp_path), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "which kernel ran where" in out
    (result,) = json.loads(file.read_text())
    assert [f["problem"] for f in result["figures"]] == [None] * 5
    assert all(f["latency"] > 0 and f["batch_time"] > 0 for f in result["figures"])
    assert result["figures"][2]["difference"] < 1e-4
    assert (tmp_path / "demo.png").stat().st_size > 1000


def test_calibrated_statistics_are_those_of_the_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    images = 5 + torch.randn(8, 3, 9, 9)
    stock.calibrate(model, [images])
    out = model(images)
    assert not model.training
    assert model[1].momentum == 0.1
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
