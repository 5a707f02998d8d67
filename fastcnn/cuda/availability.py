"""Where the CUDA backend can run, and which calls it leaves to others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cuda import capsule_routing, launch

# Positions of what shares x's dtype, x first, in each primitive's arguments.
_IMAGES = {
    "depthwise_fwd": (0, 8),
    "depthwise_bwd": (6, 0, 1),
    "separable_fwd": (0, 12),
    "dropout_fwd": (0, 3),
    "dropout_bwd": (0, 1),
    "dropout_inplace": (0,),
    "capsule_routing_fwd": (0,),
    "capsule_routing_bwd": (1, 0),
}
# Positions of the depthwise weight and (stride, padding, dilation).
_GEOMETRY = {"depthwise_fwd": (1, 9), "depthwise_bwd": (11, 12), "separable_fwd": (1, 13)}


@cache
def unavailable() -> str | None:
    """Why no primitive runs on the CUDA backend here, or None."""
    if native.module() is None:
        return "the native module was not built (FASTCNN_NATIVE=off)"
    if launch.module() is None:
        return "the native module was built without CUDA (FASTCNN_CUDA=off, or no nvcc)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the kernels need compute capability 8.0"
    return launch.module().unavailable() or None


def refuses(primitive: str, args: Sequence) -> str | None:
    """Why this call is not for the CUDA backend, or None."""
    x, *others = (args[i] for i in _IMAGES[primitive])
    for value in args:
        if isinstance(value, Tensor) and not value.is_cuda:
            return f"the cuda backend takes CUDA tensors, got one on {value.device}"
    if x.dtype not in launch.DTYPES:
        return f"the cuda backend computes in float32, bfloat16 and float16, got {x.dtype}"
    if any(t is not None and t.dtype != x.dtype for t in others):
        return f"the cuda backend takes images of one dtype, here {x.dtype}"
    try:
        if primitive in _GEOMETRY and x.numel():
            _plan_convolution(primitive, args, x)
        elif primitive.startswith("capsule"):
            capsule_routing.plan_of(primitive, args)
    except ValueError as error:
        return str(error)
    return None


def _plan_convolution(primitive: str, args: Sequence, x: Tensor) -> None:
    """Raises ValueError where a convolution of this shape has no plan on x's GPU."""
    weight_at, geometry_at = _GEOMETRY[primitive]
    channels = (args[2].shape[0],) if primitive == "separable_fwd" else ()
    launch.plan(
        primitive, x.device.index, x.dtype, tuple(x.shape), tuple(args[weight_at].shape),
        *map(tuple, args[geometry_at : geometry_at + 3]), *channels,
    )  # fmt: skip
