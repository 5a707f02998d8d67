"""The unfused backend: torch's own convolution between passes of ours, where that is measured faster than a fused kernel.

It makes the same outputs and keeps the same tensors for backward; what it gives up is memory traffic. The cpu backend
says for which calls (fastcnn.cpu.measured).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastcnn import cpu
from fastcnn.unfused.conv2d import conv2d_bwd, conv2d_fwd, depthwise_fwd

__all__ = ["conv2d_bwd", "conv2d_fwd", "depthwise_fwd"]


_LARGE = 11 * 11  # taps: 31 x 31 over 8 channels of 33 x 32 took minutes (torch 2.14), 11 x 11 a millisecond


def unavailable() -> str | None:
    """Why no primitive runs on the unfused backend here, or None: its passes are the cpu backend's."""
    return cpu.unavailable()


def refuses(primitive: str, args: Sequence) -> str | None:
    """Why this call is not for the unfused backend, or None."""
    x = args[0]
    if x.device.type != "cpu" or x.dtype not in cpu.DTYPES:
        return f"the unfused backend computes in float32 and bfloat16 on the CPU, got {x.dtype} on {x.device}"
    if primitive == "depthwise_fwd" and x.dtype is torch.bfloat16 and args[1].shape[2] * args[1].shape[3] > _LARGE:
        return "torch's bfloat16 depthwise convolution can take minutes with a large kernel"
    if primitive.endswith("_bwd") and x.dtype is torch.bfloat16 and args[-1]:
        return "sums of gradients are taken before they are rounded to bfloat16"
    return None
