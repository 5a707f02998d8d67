"""The training loop: steps, tests, checkpoints, and how a run stops early without losing more than an epoch."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from fastcnn.models import create_model, input_format
from fastcnn.nn import convert_sync_batchnorm
from fastcnn.training import checkpoint
from fastcnn.training.capsule_pictures import draw_capsules
from fastcnn.training.config import TrainConfig
from fastcnn.training.data import Data, open_data
from fastcnn.training.distributed import Group, process_group
from fastcnn.training.environment import reproducible, termination_as_interrupt
from fastcnn.training.history import Epoch, is_best, write_csv
from fastcnn.training.objective import Objective
from fastcnn.training.optimization import Ema, make_optimizer, make_schedule
from fastcnn.training.order import derived_seed
from fastcnn.training.plots import plot
from fastcnn.training.reporter import Reporter, StepReport

# A GPU would wait for each step's loss, and several processes for each other; one CPU process has it anyway.
SYNC_STEPS = 8


class NonFiniteLoss(RuntimeError):
    """A step's loss is NaN or infinite."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or SIGTERM; the message says what is kept and how to go on."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run: the model and the averaged one, if any, as the last epoch left them, and every epoch's figures."""

    model: nn.Module
    ema: nn.Module | None
    history: list[Epoch]


def _check_fits(model: nn.Module, config: TrainConfig, num_classes: int, device: torch.device) -> None:
    """Raises ValueError unless the model takes images of the configuration's size."""
    images = torch.zeros(1, input_format(config.model).channels, config.size, config.size, device=device)
    model.eval()
    try:
        with torch.no_grad():
            shape = list(model(images).shape)
    except (ValueError, RuntimeError) as error:
        size = f"{config.size} x {config.size}"
        raise ValueError(f"image_size: {config.model} cannot take images of {size} pixels: {error}") from error
    model.train()
    if shape != [1, num_classes]:
        raise ValueError(f"model: {config.model} returns shape {shape} for one image, expected [1, {num_classes}]")


class Trainer:
    """One run in one process.

    Args:
        config: what to do.
        data: the training and the test set.
        group: this process and those beside it.
        reporter: hears how it goes.

    `history` are the epochs so far, `kept` is how many of them the checkpoint holds.
    """

    def __init__(self, config: TrainConfig, data: Data, group: Group, reporter: Reporter) -> None:
        self.config, self.data, self.group, self.reporter = config, data, group, reporter
        torch.manual_seed(derived_seed("weights", config.seed))
        self.model = create_model(config.model, num_classes=data.num_classes).to(group.device)
        if config.sync_batchnorm:
            self.model = convert_sync_batchnorm(self.model)
        _check_fits(self.model, config, data.num_classes, group.device)
        self.optimizer = make_optimizer(self.model, config)
        self.ema = None if config.ema is None else Ema(self.model, config.ema)
        self.history: list[Epoch] = []
        self.kept = 0
        self.steps = data.order.steps
        self._learning_rate = make_schedule(config, self.steps)
        self._sync = 1 if group.size == 1 and group.device.type == "cpu" else SYNC_STEPS
        self._objective = group.parallel(Objective(self.model, config.label_smoothing))

    # --- checkpoints ---

    def state(self) -> dict[str, object]:
        """Everything that the rest of the run depends on.

        Random numbers need no state: each epoch's are drawn from the seed, the epoch and the process alone.
        """
        return {
            "arguments": self.config.fixed(),
            "epoch": len(self.history),
            "step": len(self.history) * self.steps,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "history": [asdict(epoch) for epoch in self.history],
        }

    def resume(self) -> None:
        """Goes back to a checkpoint.

        Raises:
            OSError, ValueError: it is not there, damaged, or of a run with other arguments.
        """
        path = self.config.checkpoint
        content = checkpoint.load(path)
        checkpoint.check_arguments(path, content["arguments"], self.config.fixed())
        if content["step"] != content["epoch"] * self.steps:
            raise ValueError(
                f"data: {self.config.data} gives {self.steps} steps per epoch, but the checkpoint {str(path)!r} has "
                f"{content['step']} steps in {content['epoch']} epochs: another training set"
            )
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.ema:
                self.ema.module.load_state_dict(content["ema"])
            self.history = [Epoch(**epoch) for epoch in content["history"]]
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"resume: {str(path)!r} does not fit {self.config.model}: {error}") from error
        self.kept = len(self.history)
        best, here = path.with_name("best.pt"), self.config.folder / "best.pt"
        if self.group.is_main and best.exists() and not here.exists():
            checkpoint.write_atomically(here, lambda file: file.write(best.read_bytes()))

    def save(self) -> bool:
        """Writes the files of the epochs so far; whether the last one is the best.

        best.pt comes before last.pt: killed between the two, the run repeats the epoch and writes the same best.pt.
        """
        best = is_best(self.history)
        if not self.group.is_main:
            return best
        folder = self.config.folder
        if best:
            epoch, weights = self.history[-1], self.ema.module if self.ema else self.model
            content = {"model": weights.state_dict(), "arguments": self.config.fixed(), "epoch": epoch.epoch}
            checkpoint.save(content | {"accuracy": epoch.best_accuracy}, folder / "best.pt")
        checkpoint.save(self.state(), folder / "last.pt")
        self.write_curves()
        return best

    def write_curves(self) -> None:
        """Writes metrics.csv and curves.png."""
        if self.group.is_main:
            write_csv(self.history, self.config.folder / "metrics.csv")
            plot({self.config.model: self.history}, self.config.folder / "curves.png")

    # --- epochs ---

    def run(self) -> TrainResult:
        """The epochs that are left."""
        for epoch in range(len(self.history) + 1, self.config.epochs + 1):
            self.history.append(self._epoch(epoch))
            best = self.save()
            self.kept = epoch
            self.reporter.epoch(self.history[-1], best)
        if self.group.is_main and hasattr(self.model, "reconstruct"):
            draw_capsules(self.ema.module if self.ema else self.model, self.data.test(), self.config.folder)
        return TrainResult(self.model, self.ema.module if self.ema else None, self.history)

    def _epoch(self, epoch: int) -> Epoch:
        start = time.perf_counter()
        torch.manual_seed(derived_seed("layers", self.config.seed, epoch, self.group.rank))
        trained = self._train(epoch)
        self.reporter.testing(epoch)
        test_loss, test_accuracy = self._test(self.model)
        ema_accuracy = self._test(self.ema.module)[1] if self.ema else None
        seconds = time.perf_counter() - start
        return Epoch(
            epoch, trained.lr, trained.loss, trained.accuracy, test_loss, test_accuracy, ema_accuracy, seconds,
            trained.images_per_second,
        )  # fmt: skip

    def _train(self, epoch: int) -> StepReport:
        """An epoch's steps; the report on all of them."""
        self._objective.train()
        start, loss, correct = time.perf_counter(), 0.0, 0.0
        recent: list[Tensor] = []
        for i, (images, labels) in enumerate(self.data.train(epoch), 1):
            done = (epoch - 1) * self.steps + i - 1
            lr = self._learning_rate(done)
            recent.append(self._step(images, labels, lr, done))
            if i % self._sync and i < self.steps:
                continue
            # Means over processes of the steps since the last time; a loss that is not finite in one is so in all.
            figures = (self.group.sum(torch.stack(recent)) / self.group.size).tolist()
            self._check_finite(figures, epoch, i - len(recent) + 1)
            recent.clear()
            loss += sum(step_loss for step_loss, _ in figures)
            correct += sum(step_correct for _, step_correct in figures)
            rate = i * self.config.batch / (time.perf_counter() - start)
            report = StepReport(epoch, i, loss / i, correct * self.group.size / (i * self.config.batch), lr, rate)
            self.reporter.step(report)
        for module in (self.model, self.ema and self.ema.module):
            if module is not None:
                self.group.share_buffers(module)
        return report

    def _step(self, images: Tensor, labels: Tensor, lr: float, done: int) -> Tensor:
        """One step of the optimiser; its loss and its number of right answers, [2]."""
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss, scores = self._objective(images, labels)
        loss.backward()
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.model, done)
        return torch.stack((loss.detach(), (scores.detach().argmax(1) == labels).sum().float()))

    def _autocast(self) -> torch.autocast:
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=enabled)

    @staticmethod
    def _check_finite(figures: list[list[float]], epoch: int, first_step: int) -> None:
        for step, (loss, _) in enumerate(figures, first_step):
            if not abs(loss) < float("inf"):
                raise NonFiniteLoss(f"loss: got {loss} in epoch {epoch}, step {step}, expected a finite number")

    @torch.no_grad()
    def _test(self, model: nn.Module) -> tuple[float, float]:
        """Mean loss and accuracy on the test set."""
        objective = Objective(model).eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.group.device)
        for images, labels in self.data.test():
            with self._autocast():
                loss, scores = objective(images, labels)
            right, count = (scores.argmax(1) == labels).sum(), len(labels)
            sums += torch.stack((loss.double() * count, right.double(), loss.new_tensor(count).double()))
        loss, right, images = self.group.sum(sums).tolist()
        return loss / images, right / images


def _prepare_folder(config: TrainConfig) -> None:
    last = config.folder / "last.pt"
    if not config.resume and last.exists():
        raise ValueError(
            f"output: {str(config.folder)!r} holds the checkpoint of another run; resume goes on with it, another "
            f"output leaves it alone"
        )
    config.folder.mkdir(parents=True, exist_ok=True)


def _interruption(trainer: Trainer | None, config: TrainConfig) -> str:
    epochs = trainer.kept if trainer else 0
    if not epochs:
        return f"{config.model}: interrupted before the first epoch was complete; nothing is kept"
    path = config.folder / "last.pt"
    return f"{config.model}: interrupted; {epochs} of {config.epochs} epochs are in {path}: add --resume to go on"


def train(config: TrainConfig, reporter: Reporter | None = None) -> TrainResult:
    """Trains a model and keeps last.pt, best.pt, metrics.csv and curves.png in the output folder, after every epoch.

    last.pt is what a run goes on from, bit for bit on the same machine with as many threads; best.pt holds, under
    "model", the weights with the best test accuracy (the averaged ones with `ema`), which
    `fastcnn.models.create_model` takes as weights. A model that reconstructs its images leaves reconstructions.png and
    dimensions.png there at the end (`fastcnn.training.capsule_pictures`). Under torchrun the processes share each batch
    and the first one writes; without `sync_batchnorm` BatchNorm's statistics in training are each process's own, and the
    first one's are kept.

    Args:
        config: what to train, on what, how and where to.
        reporter: hears of steps and epochs, in the first process.

    Raises:
        ValueError: arguments that contradict each other, the data or the checkpoint; a damaged file, by name.
        OSError: data or a checkpoint that is not there, a folder that cannot be written.
        NonFiniteLoss: the loss became NaN or infinite; names the epoch and the step.
        Interrupted: Ctrl-C or SIGTERM.
        ImportError: torchvision or matplotlib is not installed.
    """
    trainer = None
    with termination_as_interrupt(), process_group(config.device) as group, reproducible(group.device):
        hearer = reporter if reporter is not None and group.is_main else Reporter()
        try:
            _prepare_folder(config)
            trainer = Trainer(config, open_data(config, group), group, hearer)
            if config.resume:
                trainer.resume()
            trainer.write_curves()  # a folder that cannot be written is found out before hours of training
            hearer.start(config, len(trainer.history) + 1, trainer.steps)
            return trainer.run()
        except KeyboardInterrupt:
            raise Interrupted(_interruption(trainer, config)) from None
        finally:
            hearer.stop()
