"""Runs: what they write, that they resume bit for bit, and how they stop."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastcnn import cli
from fastcnn.training import Epoch, Interrupted, NonFiniteLoss, Reporter, TrainResult, checkpoint, compare, train
from fastcnn.training.reporter import ConsoleReporter, StepReport
from tests.training.tiny import config, write_folder


class Stopper(Reporter):
    """Ends a run by a signal, after an epoch or within the next one."""

    def __init__(self, after: int, within: bool = False, signal_: int = signal.SIGINT) -> None:
        self.after, self.within, self.signal = after, within, signal_

    def epoch(self, epoch: Epoch, best: bool) -> None:
        if epoch.epoch == self.after and not self.within:
            os.kill(os.getpid(), self.signal)

    def step(self, report) -> None:
        if report.epoch == self.after + 1 and report.step == 2 and self.within:
            os.kill(os.getpid(), self.signal)


def figures(history: list[Epoch]) -> list[Epoch]:
    """Without what no two runs share."""
    return [replace(epoch, seconds=0.0, images_per_second=0.0) for epoch in history]


def assert_same(ours: object, theirs: object) -> None:
    """Bit for bit, through containers."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert_same(a, b)
    else:
        assert ours == theirs


def test_a_run_learns_and_writes_its_files(root: Path) -> None:
    before = torch.random.get_rng_state()
    result = train(config(root, epochs=12, limit_steps=None, lr=0.2, ema=0.9))
    assert isinstance(result, TrainResult)
    assert result.history[-1].test_accuracy > 0.25  # ten classes
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert torch.equal(torch.random.get_rng_state(), before)
    folder = root / "run"
    assert sorted(os.listdir(folder)) == ["best.pt", "curves.png", "last.pt", "metrics.csv"]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(12)]
    assert [float(row["test_accuracy"]) for row in rows] == [e.test_accuracy for e in result.history]
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("within", [False, True], ids=["between epochs", "within an epoch"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(root: Path, within: bool) -> None:
    options = {"ema": 0.99, "nesterov": True, "label_smoothing": 0.1, "epochs": 2}
    whole = train(config(root, output=root / "whole", **options))
    with pytest.raises(Interrupted, match=r"1 of 2 epochs are in .*last.pt: add --resume"):
        train(config(root, **options), Stopper(1, within))
    torch.manual_seed(17)  # whatever the program did in between
    resumed = train(config(root, resume=True, **options))
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    assert_same(resumed.ema.state_dict(), whole.ema.state_dict())
    assert figures(resumed.history) == figures(whole.history)
    ours, theirs = (checkpoint.load(root / name / "last.pt") for name in ("run", "whole"))
    for key in ("model", "ema", "optimizer", "epoch", "step", "arguments"):
        assert_same(ours[key], theirs[key])
    best = [torch.load(root / name / "best.pt", weights_only=True) for name in ("run", "whole")]
    assert_same(*best)
    assert len((root / "run" / "metrics.csv").read_text().splitlines()) == 3


def test_a_folder_of_images_resumes_bit_for_bit(tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    options = {"data": "imagefolder", "batch": 4, "image_size": 16}
    whole = train(config(tmp_path, output=tmp_path / "whole", workers=0, **options))
    with pytest.raises(Interrupted):
        train(config(tmp_path, workers=1, **options), Stopper(1, within=False))
    resumed = train(config(tmp_path, workers=0, resume=True, **options))
    assert_same(resumed.model.state_dict(), whole.model.state_dict())


def test_sigterm_stops_a_run_as_ctrl_c_does(root: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="before the first epoch was complete"):
        train(config(root), Stopper(0, within=True, signal_=signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not (root / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "tinier"}, "model: got 'tinier', but the checkpoint .* has 'tiny'"),
        ({"batch": 8}, "batch: got 8, but the checkpoint .*last.pt' has 16"),
        ({"epochs": 3}, "epochs: got 3"),
        ({"lr": 0.2}, "lr: got 0.2"),
        ({"ema": 0.9}, "ema: got 0.9, but the checkpoint .* has None"),
        ({"dtype": "bfloat16"}, "dtype: got 'bfloat16'"),
        ({"seed": 1}, "seed: got 1"),
    ],
)
def test_contradicting_argument_is_named(root: Path, change: dict, named: str) -> None:
    with pytest.raises(Interrupted):
        train(config(root), Stopper(1))
    with pytest.raises(ValueError, match=named):
        train(config(root, resume=True, **change))


def test_another_training_set_is_noticed(root: Path) -> None:
    with pytest.raises(Interrupted):
        train(config(root, limit_steps=None), Stopper(1))
    from tests.training.tiny import write_mnist

    write_mnist(root / "other", train=80)
    with pytest.raises(ValueError, match="mnist gives 5 steps per epoch, but the checkpoint"):
        train(config(root, limit_steps=None, resume=True, data_dir=root / "other"))


def test_a_run_does_not_overwrite_another_and_a_finished_one_is_finished(root: Path) -> None:
    first = train(config(root))
    kept = (root / "run" / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"output: .*run' holds the checkpoint of another run"):
        train(config(root, seed=3))
    (root / "run" / "metrics.csv").unlink()
    again = train(config(root, resume=True))
    assert_same(again.model.state_dict(), first.model.state_dict())
    assert (root / "run" / "last.pt").read_bytes() == kept
    assert len((root / "run" / "metrics.csv").read_text().splitlines()) == 3
    elsewhere = train(config(root, resume=root / "run" / "last.pt", output=root / "elsewhere"))
    assert figures(elsewhere.history) == figures(first.history)
    assert (root / "elsewhere" / "best.pt").read_bytes() == (root / "run" / "best.pt").read_bytes()


def test_damaged_checkpoint_is_one_line(root: Path, capsys: pytest.CaptureFixture) -> None:
    train(config(root))
    path = root / "run" / "last.pt"
    path.write_bytes(path.read_bytes()[:-100])
    argv = ["train", "tiny", "--data", "mnist", "--data-dir", str(root / "data"), "--output", str(root / "run")]
    assert cli.main([*argv, "--no-download", "--device", "cpu", "--batch", "16", "--resume"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"resume: {str(path)!r} is damaged" in line


def test_loss_that_is_not_finite_names_the_epoch_and_the_step(root: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"loss: got (inf|nan) in epoch 1, step 1, expected a finite number"):
        train(config(root, model="exploding"))


def test_best_weights_are_those_of_the_best_epoch(root: Path) -> None:
    from fastcnn.models.weights import load

    states, seen = [], []

    class Keeper(Reporter):
        def epoch(self, epoch: Epoch, best: bool) -> None:
            seen.append((epoch.best_accuracy, best))
            states.append(checkpoint.load(root / "run" / "last.pt")["ema"])

    train(config(root, epochs=5, ema=0.5), Keeper())
    accuracies = [accuracy for accuracy, _ in seen]
    index = accuracies.index(max(accuracies))
    assert seen[index][1]
    assert not any(best for _, best in seen[index + 1 :])
    assert_same(load(root / "run" / "best.pt"), dict(states[index]))


def test_bfloat16_keeps_weights_in_float32(root: Path) -> None:
    result = train(config(root, dtype="bfloat16"))
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    assert figures(result.history) != figures(train(config(root, output=root / "fp32")).history)


def test_a_fused_model_trains(root: Path) -> None:
    result = train(config(root, model="mobilenet_v2", epochs=1, limit_steps=2, ema=0.9))
    assert len(result.history) == 1


def test_bar_shows_the_figures_on_a_narrow_terminal(root: Path) -> None:
    screen = io.StringIO()
    reporter = ConsoleReporter(Console(file=screen, force_terminal=True, width=80))
    reporter.start(config(root), first_epoch=2, steps=3)
    reporter.step(StepReport(2, 1, loss=0.25, accuracy=0.875, lr=0.05, images_per_second=123.4))
    reporter.stop()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    (line,) = {line for line in lines if "images/s" in line}
    assert re.fullmatch(r"tiny 2/2 ━+[╸╺]?━* 123 images/s  loss 0.250  accuracy 87.5%  lr 0.05 [-\d:]+ *", line)


def test_comparison_draws_all_models_and_goes_on_where_it_stopped(root: Path) -> None:
    settings = config(root, output=root / "both")

    class StopInSecond(Stopper):
        def step(self, report) -> None:
            if (root / "both" / "tinier" / "last.pt").exists():
                super().step(report)

    with pytest.raises(Interrupted, match="tinier: interrupted; 1 of 2"):
        compare(["tiny", "tinier"], settings, StopInSecond(1, within=True))
    finished = (root / "both" / "tiny" / "last.pt").read_bytes()
    results = compare(["tiny", "tinier"], replace(settings, resume=True))
    assert (root / "both" / "tiny" / "last.pt").read_bytes() == finished
    assert [len(result.history) for result in results.values()] == [2, 2]
    assert (root / "both" / "compare.png").read_bytes().startswith(b"\x89PNG")
    alone = train(config(root, model="tinier"))
    assert_same(alone.model.state_dict(), results["tinier"].model.state_dict())
    with pytest.raises(ValueError, match=r"resume: got 'x.pt', expected no path when models are compared"):
        compare(["tiny", "tinier"], replace(settings, resume="x.pt"))


def test_command_prints_a_line_per_epoch_and_where_the_plot_is(root: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["--data", "mnist", "--data-dir", str(root / "data"), "--device", "cpu", "--batch", "16", "--epochs", "2"]
    assert cli.main(["train", "tiny", *argv, "--output", str(root / "run")]) == 0
    out = capsys.readouterr().out
    assert "tiny  epoch   2/2  loss" in out
    assert "images/s" in out
    assert f"plot: {root / 'run' / 'curves.png'}" in out
    assert cli.main(["train", "tiny", "tinier", *argv, "--output", str(root / "both")]) == 0
    assert f"plot: {root / 'both' / 'compare.png'}" in capsys.readouterr().out
