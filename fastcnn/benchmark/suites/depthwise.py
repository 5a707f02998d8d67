"""The depthwise layers of both models alone, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcnn.benchmark.case import Case
from fastcnn.benchmark.race import RaceResult
from fastcnn.benchmark.shapes import DEPTHWISE, Depthwise
from fastcnn.benchmark.suites.common import BATCH, NAMES
from fastcnn.benchmark.suites.layers import ONE, layer_case
from fastcnn.benchmark.targets import Target, geometric_mean, mean_ratio

if TYPE_CHECKING:
    from fastcnn.benchmark.suites import Options

NAME = "depthwise"
TITLE = f"Depthwise layers of MobileNet-v2 and Xception, batch {BATCH}"
NOTES = ("`bwd`: the input's gradient and the weight's, from the output's gradient and the input.",)


def _where(layer: Depthwise) -> tuple:
    return (layer.stride, layer.stride), ONE, ONE


def _forward(layer: Depthwise, x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.fastcnn.depthwise_fwd(x, w, None, None, 0, None, None, 0, None, *_where(layer), False)[0]


def _backward(layer: Depthwise, grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    nothing = (None, None, None, 0, None)
    return torch.ops.fastcnn.depthwise_bwd(
        grad, *nothing, x, None, None, 0, None, w, *_where(layer), True, True, False
    )[:2]


def cases(options: Options) -> Iterator[Case]:
    """Every distinct layer in every dtype and direction; two small layers when quick."""
    layers = sorted(DEPTHWISE.items(), key=lambda item: item[0].size)[:2] if options.quick else DEPTHWISE.items()
    for dtype in options.dtypes:
        for backward in (False, True):
            for layer, count in layers:
                ours = _backward if backward else _forward
                yield layer_case(layer, count, dtype, ours, backward, options.device)


def targets(races: list[RaceResult], options: Options) -> list[Target]:
    """On a GPU the share of the copy bandwidth; on a CPU no more than torch takes."""
    found = []
    for dtype in (NAMES[d] for d in options.dtypes):
        for direction in ("fwd", "bwd"):
            chosen = [r for r in races if (r.tags["dtype"], r.tags["direction"]) == (dtype, direction)]
            work = f"depthwise {direction}, {dtype}, geometric mean"
            if options.device == "cpu":
                found.append(Target(work, "the better of torch NCHW and NHWC", 1.0, mean_ratio(chosen)))
            else:
                fractions = [(r.fraction_of_floor(), r.count) for r in chosen]
                measured = None if any(f is None for f, _ in fractions) else geometric_mean(fractions)
                found.append(Target(work, "the floor by the measured copy bandwidth", 0.8, measured))
    return found
