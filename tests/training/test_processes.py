"""Runs in processes of their own: two that train one model, and some that are interrupted or killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcnn.training import checkpoint, train
from tests.training.test_train import assert_same
from tests.training.tiny import config

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def start(root: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.training.processes", str(root), *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def start_pair(root: Path, *options: str) -> list[subprocess.Popen[str]]:
    """Two processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(root, *options, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")]


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """What each printed; all must succeed."""
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def wait_for_epoch(process: subprocess.Popen[str], number: int) -> None:
    """Returns when a process has printed an epoch's line."""
    for line in process.stdout:
        if f"epoch {number:>3}/" in line:
            return
    pytest.fail("the process ended too early")


def results(root: Path) -> list[dict]:
    return [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_end_with_the_same_model(root: Path) -> None:
    first, second = finish(*start_pair(root, "ema=0.9"))
    assert "epoch   2/2" in first
    assert "epoch" not in second
    ours, theirs = results(root)
    assert_same(ours["model"], theirs["model"])
    assert_same(ours["ema"], theirs["ema"])
    for a, b in zip(ours["history"], theirs["history"]):
        for name in ("lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "ema_accuracy"):
            assert a[name] == b[name]
    kept = checkpoint.load(root / "run" / "last.pt")
    assert_same(dict(kept["model"]), dict(ours["model"]))


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(root: Path) -> None:
    finish(*start_pair(root, f"output={str(root / 'whole')!r}"))
    whole = results(root)
    pair = start_pair(root)
    wait_for_epoch(pair[0], 1)
    for process in pair:
        process.kill()
        process.communicate()
    finish(*start_pair(root, "resume=True"))
    for ours, theirs in zip(results(root), whole):
        assert_same(ours["model"], theirs["model"])


@pytest.mark.parametrize("options", [{"model": "linear"}, {"model": "without_dropout", "sync_batchnorm": True}])
def test_two_processes_train_as_one_does(root: Path, options: dict[str, object]) -> None:
    finish(*start_pair(root, *(f"{name}={value!r}" for name, value in options.items())))
    alone = train(config(root, **options, output=root / "alone"))
    ours, _ = results(root)
    for key, value in alone.model.state_dict().items():
        torch.testing.assert_close(ours["model"][key], value)
    for a, b in zip(ours["history"], alone.history):
        assert a["test_loss"] == pytest.approx(b.test_loss)
        assert a["train_loss"] == pytest.approx(b.train_loss)
        assert a["train_accuracy"] == b.train_accuracy


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_stopped_process_loses_at_most_an_epoch(root: Path, signal_: int) -> None:
    process = start(root, "epochs=6")
    wait_for_epoch(process, 2)
    process.send_signal(signal_)
    output = process.communicate(timeout=60)[0]
    if signal_ == signal.SIGINT:
        assert process.returncode == 130
        assert "add --resume to go on" in output
        assert "Traceback" not in output
    kept = checkpoint.load(root / "run" / "last.pt")["epoch"]
    assert 2 <= kept < 6
    resumed = train(config(root, epochs=6, resume=True))
    whole = train(config(root, epochs=6, output=root / "whole"))
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
