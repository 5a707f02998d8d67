"""A Triton primitive against the float64 reference of the same inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcnn.ops  # noqa: F401  (registers the references)
from fastcnn import backends
from fastcnn import triton as backend
from fastcnn.ops.layout import conv_out_sizes
from tests.ops.cases import as64, backward_source, backward_upstream, forward_head, forward_tail, laid_out, on_grid
from tests.tolerances import assert_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on(device: str, args: tuple) -> list:
    """The arguments with their tensors on a device, layouts kept (a copy to a GPU would make slices dense)."""
    if device == "cpu":
        return list(args)

    def move(t: Tensor) -> Tensor:
        moved = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        return moved.copy_(t)

    return [move(a) if isinstance(a, Tensor) else a for a in args]


def check(primitive: str, args: tuple, device: str) -> None:
    """Every output of a primitive: dtype, layout, and within its dtype's tolerance of the float64 reference.

    Sums, statistics and weight gradients are float32, but of half-precision products: they take the input's tolerance.
    """
    placed = on(device, args)
    reason = backend.refuses(primitive, placed)
    if reason:
        pytest.skip(reason)
    actual = getattr(backend, primitive)(*placed)
    expected = backends.REFERENCES[primitive](*map(as64, args))
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if i == 0 and a.dim() == 4:
            assert a.dtype == args[0].dtype
            assert a.is_contiguous(memory_format=torch.channels_last)
        else:
            assert i == 0 or a.dtype == torch.float32
        assert_close(a.cpu(), e, args[0].dtype, f"{primitive} output {i}")


def out_shape(x: Tensor, channels: int, kernel, stride, padding, dilation) -> tuple[int, ...]:
    """The output's shape of a convolution of x."""
    size = conv_out_sizes(x.shape[2:], kernel, stride, padding, dilation)
    return x.shape[0], channels, *size


def forward_args(x, weight, variant, shape, *geometry) -> tuple:
    """Arguments of pointwise_fwd or depthwise_fwd (see tests.ops.cases.FORWARD for the variants)."""
    head, tail = forward_head(x.shape[1], variant), forward_tail(shape, variant, x.dtype)
    return x, weight, *head, *tail, *geometry, variant == "stats"


def backward_args(x, weight, variant, shape, needs, *geometry) -> tuple:
    """Arguments of depthwise_bwd or, with a residual first in geometry, of pointwise_bwd and conv2d_bwd.

    See tests.ops.cases.BACKWARD for the variants.
    """
    return *backward_upstream(shape, variant, x.dtype), *backward_source(x, variant), weight, *geometry, *needs


def image(n: int, c: int, size: tuple[int, int], dtype: torch.dtype, layout: str = "nhwc") -> Tensor:
    """An input on the grid of exact values, in a layout (see tests.ops.cases.LAYOUTS)."""
    x = on_grid(n, c, *size, dtype=dtype)
    return x if layout == "nhwc" else laid_out(x, layout)
