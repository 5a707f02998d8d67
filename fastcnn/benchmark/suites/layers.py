"""A single 3x3 convolution with padding 1 against torch's, forward or backward: what the layers' suites share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.benchmark.case import OURS, Case, Competitor, Entry, Work, tensors_of
from fastcnn.benchmark.suites.common import BATCH, NAMES, TORCH_EAGER, layout_of, normal, weight

ONE = (1, 1)


class Layer(Protocol):
    """As many channels in as out, in groups, of 1 image of size x size pixels."""

    channels: int
    size: int
    stride: int

    @property
    def groups(self) -> int: ...
    @property
    def out_size(self) -> int: ...
    @property
    def label(self) -> str: ...


Function = Callable[..., Tensor | tuple[Tensor, ...]]


def _torch_forward(layer: Layer, x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, None, layer.stride, 1, 1, layer.groups)


def _torch_backward(layer: Layer, grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    stride = (layer.stride, layer.stride)
    return torch.ops.aten.convolution_backward(
        grad, x, w, None, stride, ONE, ONE, False, [0, 0], layer.groups, [True, True, False]
    )[:2]


def layer_case(
    layer: Layer, count: int, dtype: torch.dtype, ours: Function, backward: bool, device: str, **tags: object
) -> Case:
    """One direction of a layer: ``ours`` takes (layer, [grad,] x, weight) and gives y, or dx and dw."""
    master = weight(2, (layer.channels, layer.channels // layer.groups, 3, 3), dtype)
    x_shape = (BATCH, layer.channels, layer.size, layer.size)
    y_shape = (BATCH, layer.channels, layer.out_size, layer.out_size)
    stock = _torch_backward if backward else _torch_forward

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        x = normal(g, x_shape, dtype)
        return (normal(g, y_shape, dtype), x) if backward else (x,)

    def entry(function: Function, layout: str) -> Entry:
        w = master.to(device, dtype).contiguous(memory_format=layout_of(layout))
        return Entry(lambda *args: function(layer, *args, w))

    competitors = [Competitor(OURS, dtype, lambda: entry(ours, "nhwc"))]
    for name, layout in zip(TORCH_EAGER, ("nchw", "nhwc")):
        competitors.append(Competitor(name, dtype, lambda layout=layout: entry(stock, layout), layout))
    x_size, y_size = (torch.Size(s).numel() for s in (x_shape, y_shape))
    macs = 9.0 * y_size * layer.channels / layer.groups
    direction = "bwd" if backward else "fwd"
    return Case(
        f"{layer.label} {NAMES[dtype]} {direction}",
        Work((4.0 if backward else 2.0) * macs, float(dtype.itemsize * (x_size * (1 + backward) + y_size)), dtype),
        inputs,
        lambda *args: tensors_of(stock(layer, *args, master.to(args[0]))),
        tuple(competitors),
        count,
        tags={"dtype": NAMES[dtype], "direction": direction, **tags},
    )
