"""The CPU backend: C++ kernels, one algorithm per op, compiled per instruction set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn import native

DTYPES = (torch.float32, torch.bfloat16)


def unavailable() -> str | None:
    """Why no primitive runs on the CPU backend here, or None."""
    return None if native.module() else "the native module was not built (FASTCNN_NATIVE=off)"


def refuses(primitive: str, args: Sequence) -> str | None:
    """Why this call is not for the CPU backend, or None."""
    for value in args:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return f"the cpu backend takes CPU tensors, got one on {value.device}"
    if args[0].dtype not in DTYPES:
        return f"the cpu backend computes in float32 and bfloat16, got {args[0].dtype}"
    return None
