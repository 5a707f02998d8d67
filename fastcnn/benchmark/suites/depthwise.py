"""The depthwise layers of both models alone, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.benchmark.case import OURS, Case, Competitor, Entry, Work
from fastcnn.benchmark.race import RaceResult
from fastcnn.benchmark.shapes import DEPTHWISE, Depthwise
from fastcnn.benchmark.suites.common import BATCH, NAMES, TORCH_EAGER, layout_of, normal, weight
from fastcnn.benchmark.targets import Target, geometric_mean, mean_ratio

if TYPE_CHECKING:
    from fastcnn.benchmark.suites import Options

NAME = "depthwise"
TITLE = f"Depthwise layers of MobileNet-v2 and Xception, batch {BATCH}"
NOTES = ("`bwd`: the input's gradient and the weight's, from the output's gradient and the input.",)


def _geometry(layer: Depthwise) -> tuple:
    return (layer.stride, layer.stride), (1, 1), (1, 1)


def _torch_forward(layer: Depthwise, x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, None, layer.stride, 1, 1, layer.channels)


def _torch_backward(layer: Depthwise, grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    stride, padding, dilation = _geometry(layer)
    return torch.ops.aten.convolution_backward(
        grad, x, w, None, stride, padding, dilation, False, [0, 0], layer.channels, [True, True, False]
    )[:2]


def _ours_forward(layer: Depthwise, x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.fastcnn.depthwise_fwd(x, w, None, None, 0, None, None, 0, None, *_geometry(layer), False)[0]


def _ours_backward(layer: Depthwise, grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    nothing = (None, None, None, 0, None)
    return torch.ops.fastcnn.depthwise_bwd(
        grad, *nothing, x, None, None, 0, None, w, *_geometry(layer), True, True, False
    )[:2]


def _case(layer: Depthwise, count: int, dtype: torch.dtype, backward: bool, device: str) -> Case:
    master = weight(2, (layer.channels, 1, 3, 3), dtype)
    x_shape = (BATCH, layer.channels, layer.size, layer.size)
    y_shape = (BATCH, layer.channels, layer.out_size, layer.out_size)
    stock, ours = (_torch_backward, _ours_backward) if backward else (_torch_forward, _ours_forward)

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        x = normal(g, x_shape, dtype)
        return (normal(g, y_shape, dtype), x) if backward else (x,)

    def entry(function, layout: str) -> Entry:
        w = master.to(device, dtype)
        w = w if function is ours else w.contiguous(memory_format=layout_of(layout))
        return Entry(lambda *args: function(layer, *args, w))

    macs = 9.0 * y_shape[0] * y_shape[1] * y_shape[2] * y_shape[3]
    x_size, y_size = (torch.Size(s).numel() for s in (x_shape, y_shape))
    traffic = dtype.itemsize * (2 * x_size + y_size if backward else x_size + y_size)
    competitors = [Competitor(OURS, dtype, lambda: entry(ours, "nhwc"))]
    for name, layout in zip(TORCH_EAGER, ("nchw", "nhwc")):
        competitors.append(Competitor(name, dtype, lambda layout=layout: entry(stock, layout), layout))
    direction = "bwd" if backward else "fwd"
    return Case(
        f"{layer.label} {NAMES[dtype]} {direction}",
        Work((4.0 if backward else 2.0) * macs, traffic, dtype),
        inputs,
        lambda *args: tensors(stock(layer, *args, master.to(args[0]))),
        tuple(competitors),
        count,
        tags={"dtype": NAMES[dtype], "direction": direction},
    )


def tensors(output: object) -> tuple[Tensor, ...]:
    """One tensor or several, as several."""
    return output if isinstance(output, tuple) else (output,)


def cases(options: Options) -> Iterator[Case]:
    """Every distinct layer in every dtype and direction; two small layers when quick."""
    layers = sorted(DEPTHWISE.items(), key=lambda item: item[0].size)[:2] if options.quick else DEPTHWISE.items()
    for dtype in options.dtypes:
        for backward in (False, True):
            for layer, count in layers:
                yield _case(layer, count, dtype, backward, options.device)


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
