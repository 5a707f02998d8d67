"""Whole models: inference, a training step, and what it keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastcnn.benchmark import memory, peers, stock
from fastcnn.benchmark.case import Case, Work
from fastcnn.benchmark.race import RaceResult
from fastcnn.benchmark.suites.common import BATCH, NAMES
from fastcnn.benchmark.targets import Target
from fastcnn.training.objective import Objective

if TYPE_CHECKING:
    from fastcnn.benchmark.suites import Options

NAME = "models"
TITLE = "Whole models"
NOTES = (
    "Random weights; BatchNorm has random images' statistics. torch's bf16 is autocast. Floors: computing.",
    "`train`: forward, loss, backward; without the optimizer, which is the same for all.",
)
INFERENCE = ("mobilenet_v2", "xception", "resnet50", "densenet121", "googlenet", "inception_v3")
TRAINING = ("mobilenet_v2", "resnet50", "resnet18", "vgg16_bn", "wrn28_10", "lenet5", "densenet121")
SAVED_MEGABYTES = {"mobilenet_v2": 40.0, "resnet50": 48.0, "densenet121": 40.0}  # per image, at most


@lru_cache(maxsize=2)
def calibrated(name: str) -> nn.Module:
    """The stock model with random weights and statistics of random images."""
    generator = torch.Generator().manual_seed(5)
    known = stock.MODELS[name]
    batches = [torch.randn((4, known.channels, known.size, known.size), generator=generator) for _ in range(2)]
    return stock.calibrate(stock.seeded(name), batches)


def _inference(name: str, batch: int, dtype: torch.dtype, options: Options) -> Case:
    shape = (batch, 3, stock.MODELS[name].size, stock.MODELS[name].size)

    def model() -> nn.Module:
        return calibrated(name)

    def reference(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (peers.placed(model(), "nchw", x.device.type).double()(x),)

    return Case(
        f"{name} batch {batch} {NAMES[dtype]}",
        Work(2.0 * stock.MODELS[name].macs * batch, 0.0, dtype),
        lambda g: (torch.randn(shape, generator=g),),
        reference,
        peers.inference_competitors(name, model, dtype, torch.randn(shape), options.device, not options.compiles()),
        yardsticks={dtype: peers.EAGER_NHWC},
        tags={"model": name, "batch": batch, "dtype": NAMES[dtype], "form": "inference"},
    )


def training_case(name: str, dtype: torch.dtype, options: Options) -> Case:
    """A training step of a model without the optimizer; two images when quick."""
    known = stock.MODELS[name]
    batch = 2 if options.quick else known.batch
    shape = (batch, known.channels, known.size, known.size)

    def model() -> nn.Module:
        return calibrated(name)

    def inputs(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        return torch.randn(shape, generator=g), torch.randint(known.classes, (batch,), generator=g)

    def reference(x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        device = x.device.type
        exact = Objective(peers.placed(model(), "nchw", device).double())
        entry = peers.training_entry(exact, torch.float64, device)
        return entry.collect(entry.run(x, target))

    return Case(
        f"{name} batch {batch} {NAMES[dtype]} train",
        Work(6.0 * known.macs * batch, 0.0, dtype),
        inputs,
        reference,
        peers.training_competitors(name, model, dtype, options.device, not options.compiles()),
        yardsticks={dtype: peers.EAGER_NHWC},
        tags={"model": name, "batch": batch, "dtype": NAMES[dtype], "form": "train"},
    )


def cases(options: Options) -> Iterator[Case]:
    """Training steps, then inference with batch 1 and 8, in every dtype; the smallest model alone when quick."""
    for name in TRAINING[:1] if options.quick else TRAINING:
        for dtype in options.dtypes:
            yield training_case(name, dtype, options)
    for name in INFERENCE[:1] if options.quick else INFERENCE:
        for batch in (1,) if options.quick else (1, BATCH):
            for dtype in options.dtypes:
                yield _inference(name, batch, dtype, options)


def saved_megabytes(build: Callable[[], nn.Module], size: int = 224, batch: int = 2) -> float:
    """MB (10⁶ bytes) per image that a training forward in float32 keeps for backward."""
    model = peers.without_dropout(build()).train()
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    return memory.saved_bytes(model, lambda: model(x).sum()) / batch / 1e6


def _saved_target(name: str) -> Target:
    def ours() -> nn.Module:
        return peers.fastcnn_model(name, lambda: calibrated(name))

    try:
        measured = saved_megabytes(ours)
    except (ImportError, AttributeError, RuntimeError):  # the races have said why
        measured = None
    against = f"MB; {saved_megabytes(lambda: stock.seeded(name)):.1f} in torch"
    work = f"{name}, saved activations per image, fp32"
    return Target(work, against, SAVED_MEGABYTES[name], measured, less_is_better=True)


def _recomputing_target() -> Target:
    """DenseNet-121 that computes its 1x1 outputs again, beside torchvision's memory_efficient."""
    from torchvision.models import densenet121

    from fastcnn import models

    ours = saved_megabytes(lambda: models.densenet121(memory_efficient=True))
    theirs = saved_megabytes(lambda: densenet121(memory_efficient=True))
    work = "densenet121 memory_efficient, saved activations per image, fp32"
    return Target(work, f"MB; {theirs:.1f} in torch", 25.0, ours, less_is_better=True)


# (model, form, dtype): (the best of torch, OpenVINO)
BOUNDS = {
    ("mobilenet_v2", "inference", "fp32"): (1.5, 1.0),
    ("mobilenet_v2", "inference", "bf16"): (1.8, 1.0),
    ("xception", "inference", "fp32"): (1.3, 1.0),
    ("xception", "inference", "bf16"): (1.6, 1.0),
    ("mobilenet_v2", "train", "fp32"): (1.5, None),
    ("mobilenet_v2", "train", "bf16"): (2.0, None),
    ("resnet50", "inference", "fp32"): (None, 1.0),
    ("resnet50", "inference", "bf16"): (None, 1.3),
    ("resnet50", "train", "fp32"): (1.4, None),
    ("resnet50", "train", "bf16"): (2.0, None),
    ("densenet121", "inference", "fp32"): (None, 1.2),
    ("densenet121", "inference", "bf16"): (None, 1.5),
    **{(name, "inference", "fp32"): (None, 1.0) for name in ("googlenet", "inception_v3")},
    **{(name, "inference", "bf16"): (None, 1.3) for name in ("googlenet", "inception_v3")},
    **{(name, "train", "fp32"): (1.3, None) for name in TRAINING[2:-1]},
    **{(name, "train", "bf16"): (1.8, None) for name in TRAINING[2:-1]},
    ("densenet121", "train", "fp32"): (1.7, None),
    ("densenet121", "train", "bf16"): (2.2, None),
}
OPENVINO_GOALS = {("resnet50", "fp32"): 1.2, ("resnet50", "bf16"): 2.0}


def targets(races: list[RaceResult], options: Options) -> list[Target]:
    """The issue's ratios of each model that ran, and the saved activations."""
    found = []
    for race in races:
        t = race.tags
        torch_bound, openvino_bound = BOUNDS.get((t["model"], t["form"], t["dtype"]), (None, None))
        if options.device != "cpu":
            torch_bound, openvino_bound = (1.5 if t["form"] == "train" else 1.0), None
        ran = [p for p in peers.TORCH if race.median(p)]
        if torch_bound:
            found.append(Target(race.name, f"the best of {', '.join(ran)}", torch_bound, race.ratio_to_best(ran)))
        if openvino_bound and peers.OPENVINO in race.rows:
            goal = OPENVINO_GOALS.get((t["model"], t["dtype"]), max(openvino_bound, 1.5))
            found.append(
                Target(race.name, f"OpenVINO; the goal is {goal:g}", openvino_bound, race.ratio(peers.OPENVINO))
            )
    trained = {r.tags["model"] for r in races if r.tags["form"] == "train"} if options.device == "cpu" else set()
    if "densenet121" in trained:
        found.append(_recomputing_target())
    return found + [_saved_target(name) for name in SAVED_MEGABYTES if name in trained]
