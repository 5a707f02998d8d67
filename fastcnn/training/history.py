"""What each epoch gave, and the CSV file of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fastcnn.training.checkpoint import write_atomically


@dataclass(frozen=True)
class Epoch:
    """An epoch's figures. Losses are means over images, accuracies fractions of them.

    Args:
        epoch: from 1.
        lr: the last step's learning rate.
        train_loss, train_accuracy: over the epoch's steps, with augmentation and label smoothing, while weights change.
        test_loss, test_accuracy: of the weights after the epoch, on the whole test set.
        ema_accuracy: the averaged weights' on the test set; None without an average.
        seconds: wall time of training and testing.
        images_per_second: in training alone.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    ema_accuracy: float | None
    seconds: float
    images_per_second: float

    @property
    def best_accuracy(self) -> float:
        """What the best weights are chosen by: the average's test accuracy where there is one."""
        return self.test_accuracy if self.ema_accuracy is None else self.ema_accuracy


def is_best(history: Sequence[Epoch]) -> bool:
    """Whether the last epoch is better than all before it."""
    return all(history[-1].best_accuracy > epoch.best_accuracy for epoch in history[:-1])


def write_csv(history: Sequence[Epoch], path: Path) -> None:
    """All epochs so far. The file is written whole, so that it agrees with the checkpoint whatever was interrupted."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in history)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
