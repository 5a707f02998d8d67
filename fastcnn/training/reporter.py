"""Who hears how a run goes: nobody, a program's own reporter, or a terminal with a progress bar."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from fastcnn.training.config import TrainConfig
from fastcnn.training.history import Epoch


class StepReport(NamedTuple):
    """The epoch so far: loss and accuracy (a fraction) are means over its steps, `lr` is the last step's."""

    epoch: int
    step: int
    loss: float
    accuracy: float
    lr: float
    images_per_second: float


class Reporter:
    """Hears nothing but is called; subclasses override what they want to know. An exception raised here ends the run."""

    def start(self, config: TrainConfig, first_epoch: int, steps: int) -> None:
        """A run begins or goes on with `first_epoch` (from 1), of `steps` steps an epoch."""

    def step(self, report: StepReport) -> None:
        """Some steps were taken."""

    def testing(self, epoch: int) -> None:
        """An epoch's steps are done and its test begins."""

    def epoch(self, epoch: Epoch, best: bool) -> None:
        """An epoch is complete and in the checkpoint; `best` if none before it was better."""

    def stop(self) -> None:
        """The run is over, finished or not."""


class ConsoleReporter(Reporter):
    """A progress bar over all epochs, on a terminal, and a line per epoch, anywhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._name, self._epochs, self._steps = "", 0, 0

    def start(self, config: TrainConfig, first_epoch: int, steps: int) -> None:
        """Shows the bar."""
        self._name, self._epochs, self._steps = config.model, config.epochs, steps
        columns = (
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),  # cut short, never wrapped
            TimeRemainingColumn(),
        )
        self._progress = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        total, done = steps * config.epochs, steps * (first_epoch - 1)
        self._task = self._progress.add_task(escape(self._name), total=total, completed=done, figures="")
        self._progress.start()

    def step(self, report: StepReport) -> None:
        """Moves the bar."""
        figures = (
            f"{report.images_per_second:.0f} images/s  loss {report.loss:.3f}  accuracy {report.accuracy:.1%}  "
            f"lr {report.lr:.2g}"
        )
        self._update(report.epoch, figures, (report.epoch - 1) * self._steps + report.step)

    def testing(self, epoch: int) -> None:
        """Says so beside the bar."""
        self._update(epoch, "testing", epoch * self._steps)

    def _update(self, epoch: int, figures: str, completed: int) -> None:
        if self._progress is not None:
            title = f"{escape(self._name)} {epoch}/{self._epochs}"
            self._progress.update(self._task, description=title, completed=completed, figures=figures)

    def epoch(self, epoch: Epoch, best: bool) -> None:
        """Prints the epoch's line."""
        average = "" if epoch.ema_accuracy is None else f"  average {epoch.ema_accuracy:.2%}"
        self._console.print(
            f"{self._name}  epoch {epoch.epoch:>3}/{self._epochs}  loss {epoch.train_loss:.4f}  "
            f"accuracy {epoch.train_accuracy:.2%}  test loss {epoch.test_loss:.4f}  test {epoch.test_accuracy:.2%}"
            f"{average}  {epoch.images_per_second:.0f} images/s  {epoch.seconds:.1f} s{'  best' if best else ''}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip

    def stop(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
