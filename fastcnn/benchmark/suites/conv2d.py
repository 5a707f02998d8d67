"""The 3x3 layers of ResNet-50 and the grouped ones of ResNeXt-50, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.benchmark.case import OURS, Case, Competitor, Entry, Work
from fastcnn.benchmark.race import RaceResult
from fastcnn.benchmark.shapes import CONV2D, Conv2d
from fastcnn.benchmark.suites.common import BATCH, NAMES, TORCH_EAGER, layout_of, normal, weight
from fastcnn.benchmark.suites.depthwise import tensors
from fastcnn.benchmark.targets import Target, mean_ratio

if TYPE_CHECKING:
    from fastcnn.benchmark.suites import Options

NAME = "conv2d"
TITLE = f"3×3 layers of ResNet-50 and ResNeXt-50 (32×4d), batch {BATCH}"
NOTES = ("`bwd`: the input's gradient and the weight's, from the output's gradient and the input; nothing is fused.",)
_ONE = (1, 1)


def _torch_forward(layer: Conv2d, x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, None, layer.stride, 1, 1, layer.groups)


def _torch_backward(layer: Conv2d, grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    stride = (layer.stride, layer.stride)
    return torch.ops.aten.convolution_backward(
        grad, x, w, None, stride, _ONE, _ONE, False, [0, 0], layer.groups, [True, True, False]
    )[:2]


def _ours_forward(layer: Conv2d, x: Tensor, w: Tensor) -> Tensor:
    where = ((layer.stride, layer.stride), _ONE, _ONE, layer.groups)
    return torch.ops.fastcnn.conv2d_fwd(x, w, None, None, 0, None, None, 0, None, *where, False)[0]


def _ours_backward(layer: Conv2d, grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    where = ((layer.stride, layer.stride), _ONE, _ONE, layer.groups)
    nothing = (None, None, None, 0, None)
    return torch.ops.fastcnn.conv2d_bwd(grad, *nothing, x, None, None, 0, None, w, *where, True, True, False)[:2]


def _case(layer: Conv2d, count: int, dtype: torch.dtype, backward: bool, device: str) -> Case:
    master = weight(2, (layer.channels, layer.channels // layer.groups, 3, 3), dtype)
    x_shape = (BATCH, layer.channels, layer.size, layer.size)
    y_shape = (BATCH, layer.channels, layer.out_size, layer.out_size)
    stock, ours = (_torch_backward, _ours_backward) if backward else (_torch_forward, _ours_forward)

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        x = normal(g, x_shape, dtype)
        return (normal(g, y_shape, dtype), x) if backward else (x,)

    def entry(function, layout: str) -> Entry:
        w = master.to(device, dtype).contiguous(memory_format=layout_of(layout))
        return Entry(lambda *args: function(layer, *args, w))

    macs = float(torch.Size(y_shape).numel()) * 9 * layer.channels / layer.groups
    moved = torch.Size(x_shape).numel() * (2 if backward else 1) + torch.Size(y_shape).numel()
    competitors = [Competitor(OURS, dtype, lambda: entry(ours, "nhwc"))]
    for name, layout in zip(TORCH_EAGER, ("nchw", "nhwc")):
        competitors.append(Competitor(name, dtype, lambda layout=layout: entry(stock, layout), layout))
    direction = "bwd" if backward else "fwd"
    return Case(
        f"{layer.label} {NAMES[dtype]} {direction}",
        Work((4.0 if backward else 2.0) * macs, float(dtype.itemsize * moved), dtype),
        inputs,
        lambda *args: tensors(stock(layer, *args, master.to(args[0]))),
        tuple(competitors),
        count,
        tags={"dtype": NAMES[dtype], "direction": direction, "grouped": layer.groups > 1},
    )


def cases(options: Options) -> Iterator[Case]:
    """Every distinct layer in every dtype and direction; the smallest of each model when quick."""
    layers = sorted(CONV2D.items(), key=lambda item: (item[0].size, item[0].groups))
    for dtype in options.dtypes:
        for backward in (False, True):
            for layer, count in layers[:2] if options.quick else layers:
                yield _case(layer, count, dtype, backward, options.device)


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
