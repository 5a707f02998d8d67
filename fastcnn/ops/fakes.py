"""Output shapes of the convolution primitives, for torch.compile and torch.export."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn.ops.layout import accumulation_dtype, conv_out_sizes, empty_nhwc

Pair = tuple[int, int]


def statistics_fake(channels: int, x: Tensor, stats: bool) -> tuple[Tensor, Tensor]:
    """Mean and var of an output of so many channels."""
    mean = torch.empty(channels if stats else 0, dtype=accumulation_dtype(x), device=x.device)
    return mean, torch.empty_like(mean)


def convolution_fake(
    x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean, var of a convolution forward."""
    kernel = weight.shape[2:]
    size = conv_out_sizes(x.shape[2:], kernel, stride, padding, dilation)
    y = empty_nhwc(x.shape[0], weight.shape[0], size[0], size[1], like=x)
    return y, *statistics_fake(weight.shape[0], x, stats)


def convolution_into_fake(out: Tensor, x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """mean, var of a convolution forward that writes to ``out``; its last argument is whether they are asked for."""
    return statistics_fake(out.shape[1], x, rest[-1])


def convolution_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool, need_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw, sums of a convolution backward."""
    acc = accumulation_dtype(x)
    dx = empty_nhwc(*x.shape, like=grad) if need_dx else grad.new_empty(0)
    dw = torch.empty(weight.shape if need_dw else (0,), dtype=acc, device=x.device)
    sums = torch.empty((2, x.shape[1]) if need_sums else (0,), dtype=acc, device=x.device)
    return dx, dw, sums
