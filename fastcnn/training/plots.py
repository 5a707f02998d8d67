"""Curves of one run or of several in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastcnn.benchmark.stock import require
from fastcnn.training.checkpoint import write_atomically
from fastcnn.training.history import Epoch

COLOURS = ("#c2571a", "#2a7f62", "#3b5b92", "#8a4f9e", "#9a8b1f", "#6b6b6b")


def _errors(accuracies: Sequence[float]) -> list[float]:
    return [100 * (1 - accuracy) for accuracy in accuracies]


def plot(runs: Mapping[str, Sequence[Epoch]], path: Path) -> None:
    """Loss and error in per cent over the epochs, a colour per run: training dashed, test solid, the average dotted.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure  # without pyplot: its backend is the caller's affair

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, error = figure.subplots(1, 2)
    for i, (name, history) in enumerate(runs.items()):
        colour = COLOURS[i % len(COLOURS)]
        epochs = [e.epoch for e in history]
        train, test = {"color": colour, "ls": "--", "marker": "."}, {"color": colour, "ls": "-", "marker": "."}
        loss.plot(epochs, [e.train_loss for e in history], label=f"{name}, training", **train)
        loss.plot(epochs, [e.test_loss for e in history], label=f"{name}, test", **test)
        error.plot(epochs, _errors([e.train_accuracy for e in history]), label=f"{name}, training", **train)
        error.plot(epochs, _errors([e.test_accuracy for e in history]), label=f"{name}, test", **test)
        averaged = [e for e in history if e.ema_accuracy is not None]
        if averaged:
            values = _errors([e.ema_accuracy for e in averaged])
            error.plot([e.epoch for e in averaged], values, color=colour, ls=":", label=f"{name}, average")
    for axes, label in ((loss, "loss"), (error, "error, %")):
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    # Before BatchNorm's statistics settle, a test loss may be thousands: the axis is the training losses'.
    losses = [epoch.train_loss for history in runs.values() for epoch in history]
    if losses:
        loss.set_ylim(0, 1.5 * max(losses))
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
