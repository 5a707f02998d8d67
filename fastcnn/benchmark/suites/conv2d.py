"""The 3x3 layers of ResNet-50 and the grouped ones of ResNeXt-50, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcnn.benchmark.case import Case
from fastcnn.benchmark.race import RaceResult
from fastcnn.benchmark.shapes import CONV2D, Conv2d
from fastcnn.benchmark.suites.common import BATCH, NAMES, TORCH_EAGER
from fastcnn.benchmark.suites.layers import ONE, layer_case
from fastcnn.benchmark.targets import Target, mean_ratio

if TYPE_CHECKING:
    from fastcnn.benchmark.suites import Options

NAME = "conv2d"
TITLE = f"3×3 layers of ResNet-50 and ResNeXt-50 (32×4d), batch {BATCH}"
NOTES = ("`bwd`: the input's gradient and the weight's, from the output's gradient and the input; nothing is fused.",)


def _where(layer: Conv2d) -> tuple:
    return (layer.stride, layer.stride), ONE, ONE, layer.groups


def _forward(layer: Conv2d, x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.fastcnn.conv2d_fwd(x, w, None, None, 0, None, None, 0, None, *_where(layer), False)[0]


def _backward(layer: Conv2d, grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    nothing, source = (None, None, None, 0, None), (x, None, None, 0, None)
    return torch.ops.fastcnn.conv2d_bwd(grad, *nothing, *source, w, None, *_where(layer), True, True, False)[:2]


def cases(options: Options) -> Iterator[Case]:
    """Every distinct layer in every dtype and direction; the smallest of each model when quick."""
    layers = sorted(CONV2D.items(), key=lambda item: (item[0].size, item[0].groups))
    for dtype in options.dtypes:
        for backward in (False, True):
            for layer, count in layers[:2] if options.quick else layers:
                ours = _backward if backward else _forward
                yield layer_case(layer, count, dtype, ours, backward, options.device, grouped=layer.groups > 1)


def targets(races: list[RaceResult], options: Options) -> list[Target]:
    """Dense layers at least as fast as torch; grouped ones twice as fast as torch NHWC, on a CPU."""
    found = []
    for dtype in (NAMES[d] for d in options.dtypes):
        for direction in ("fwd", "bwd"):
            for grouped in (False, True):
                wanted = (dtype, direction, grouped)
                chosen = [r for r in races if (r.tags["dtype"], r.tags["direction"], r.tags["grouped"]) == wanted]
                work = f"{'grouped ' if grouped else ''}3×3 layers, {direction}, {dtype}, geometric mean"
                if grouped:
                    found.append(Target(work, TORCH_EAGER[1], 2.0, mean_ratio(chosen, TORCH_EAGER[1:])))
                else:
                    found.append(Target(work, "the better of torch NCHW and NHWC", 1.0, mean_ratio(chosen)))
    return found
