"""What a training run is asked to do, checked before anything is read, built or written."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fastcnn.models import input_format, list_models
from fastcnn.training.recipes import OPTIMIZERS, SCHEDULES, Recipe, recipe_of

DATA_SETS = ("mnist", "cifar10", "cifar100", "imagefolder")
DTYPES = ("float32", "bfloat16")
DEFAULT_SIZES = {"imagefolder": 224}  # pixels at most; the others are 32

# What may differ between a checkpoint and the run that goes on from it: where things are and how they are loaded.
FREE_ON_RESUME = ("data_dir", "output", "workers", "device", "download", "resume")


@dataclass(frozen=True)
class TrainConfig:
    """A training run: SGD with momentum, linear warm-up and one cosine down to zero, or what a model's paper used.

    Args:
        model: a name from `fastcnn.models.list_models()`.
        data: mnist, cifar10, cifar100 or imagefolder.
        data_dir: torchvision's root of the data set; for imagefolder the folder that holds train/ and val/.
        output: the folder for last.pt, best.pt, metrics.csv and curves.png; None: train-output/MODEL-DATA.
        epochs: passes over the training set, or over `limit_steps` batches of it.
        batch: images per optimiser step, of all processes together.
        optimizer: sgd or adam; None: the model's (`fastcnn.training.recipes`), sgd for most.
        lr: the learning rate at the end of the warm-up; None: 0.1 for sgd, 0.001 for adam.
        momentum, nesterov: SGD's.
        weight_decay: L2 penalty; biases and normalisations have none; None: 5e-4 for sgd, 0 for adam.
        schedule: cosine, down to zero, or exponential; None: cosine for sgd, exponential for adam.
        decay, decay_steps: the exponential schedule multiplies the learning rate by `decay` over `decay_steps` steps.
        warmup_epochs: length of the warm-up, fractions allowed; None: a tenth of the run, at most one epoch, before a
            cosine, and nothing before an exponential decay.
        label_smoothing: probability mass spread over all classes, in the training loss only; for models that train on
            cross-entropy.
        ema: decay per step of an exponential moving average of weights and statistics; None: no average.
        sync_batchnorm: whether BatchNorm's batch in training is that of all processes together.
        dtype: float32, or bfloat16 for autocast (weights and optimiser stay float32).
        seed: of the initial weights, the order of the images and their augmentation.
        workers: processes that decode images (imagefolder only; the other sets are in memory).
        device: such as cpu, cuda or cuda:1; None: cuda where there is one. torchrun's processes each take their own GPU.
        limit_steps: at most so many steps per epoch: a fixed budget; None: the whole training set.
        image_size: pixels along an axis of what the model gets; None: 32, for imagefolder 224, but no more than the
            model's own.
        download: whether a data set that is not in `data_dir` is downloaded into it.
        resume: True goes on from last.pt in `output`, a path from that checkpoint.

    Raises:
        ValueError: a value out of range, an unknown model or data set.
    """

    model: str
    data: str = "cifar10"
    data_dir: str | os.PathLike[str] = "data"
    output: str | os.PathLike[str] | None = None
    epochs: int = 30
    batch: int = 128
    optimizer: str | None = None
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float | None = None
    schedule: str | None = None
    decay: float = 0.96
    decay_steps: int = 2000
    warmup_epochs: float | None = None
    label_smoothing: float = 0.0
    ema: float | None = None
    sync_batchnorm: bool = False
    dtype: str = "float32"
    seed: int = 0
    workers: int = 2
    device: str | None = None
    limit_steps: int | None = None
    image_size: int | None = None
    download: bool = True
    resume: bool | str | os.PathLike[str] = False

    def __post_init__(self) -> None:
        for name, known in (("model", list_models()), ("data", DATA_SETS), ("dtype", DTYPES)):
            self._require(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            self._require(name, getattr(self, name) in (None, *known), f"one of {', '.join(known)}")
        for name, least in (("epochs", 1), ("batch", 1), ("decay_steps", 1), ("workers", 0), ("seed", 0)):
            self._require_integer(name, least)
        for name in ("limit_steps", "image_size"):
            self._require_integer(name, 1, optional=True)
        if self.lr is not None:
            self._require_number("lr", "a number above 0", lambda v: v > 0)
        self._require_number("momentum", "a number from 0 up to, not including, 1", lambda v: 0 <= v < 1)
        if self.weight_decay is not None:
            self._require_number("weight_decay", "a number of at least 0", lambda v: v >= 0)
        self._require_number("decay", "a number above 0, at most 1", lambda v: 0 < v <= 1)
        self._require_number("label_smoothing", "a number from 0 up to, not including, 1", lambda v: 0 <= v < 1)
        if self.ema is not None:
            self._require_number("ema", "a decay between 0 and 1", lambda v: 0 < v < 1)
        if self.warmup_epochs is not None:
            self._require_number("warmup_epochs", f"0 to {self.epochs} epochs", lambda v: 0 <= v <= self.epochs)
        self._require("nesterov", not self.nesterov or self.momentum > 0, "a momentum above 0 with it")

    def _require(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    def _require_integer(self, name: str, least: int, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        self._require(name, fits, f"an integer of at least {least}")

    def _require_number(self, name: str, expected: str, fits) -> None:
        value = getattr(self, name)
        self._require(name, isinstance(value, (int, float)) and math.isfinite(value) and fits(value), expected)

    @property
    def recipe(self) -> Recipe:
        """The optimiser and what goes with it: what was asked for, else the model's."""
        return recipe_of(self.model, self.optimizer, self.lr, self.weight_decay, self.schedule)

    @property
    def warmup(self) -> float:
        """The length of the warm-up in epochs."""
        if self.warmup_epochs is not None:
            return float(self.warmup_epochs)
        return min(1.0, self.epochs / 10) if self.recipe.schedule == "cosine" else 0.0

    @property
    def size(self) -> int:
        """Pixels along an axis of what the model gets."""
        return self.image_size or min(DEFAULT_SIZES.get(self.data, 32), input_format(self.model).size)

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.output) if self.output is not None else Path("train-output") / f"{self.model}-{self.data}"

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that the run goes on from, if `resume` says so."""
        return self.folder / "last.pt" if self.resume is True else Path(self.resume or "")

    def fixed(self) -> dict[str, object]:
        """The arguments that a run which goes on from a checkpoint must share with it, by name.

        A cosine ends with the run; an exponential schedule knows no end, and a run with it may get more epochs.
        """
        free = (*FREE_ON_RESUME, "epochs") if self.recipe.schedule == "exponential" else FREE_ON_RESUME
        return {name: value for name, value in asdict(self).items() if name not in free}
