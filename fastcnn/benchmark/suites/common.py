"""What the suites share: dtype names, random tensors, the works of convolutions."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
TORCH_EAGER = ("torch NCHW", "torch NHWC")
BATCH = 8


def rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t's values as the dtype has them, in float32: what a case in that dtype takes as exact."""
    return t.to(dtype).float()


def normal(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal random numbers that the dtype represents, in float32."""
    return rounded(scale * torch.randn(shape, generator=generator), dtype)


def weight(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A convolution weight that keeps the variance (fan-in), in float32."""
    fan_in = shape[1] * shape[2] * shape[3] if len(shape) == 4 else shape[1]
    return normal(torch.Generator().manual_seed(seed), shape, dtype, fan_in**-0.5)


def layout_of(layout: str) -> torch.memory_format:
    """torch's memory format for "nchw" or "nhwc"."""
    return torch.channels_last if layout == "nhwc" else torch.contiguous_format


def autocast(dtype: torch.dtype, device: str) -> AbstractContextManager:
    """torch.autocast in half precision, nothing in float32."""
    if dtype.itemsize > 2:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=dtype)
