"""From tensors to what the native launchers take: pointers, pixel strides, cached geometry and plans."""

from __future__ import annotations

from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.ops.layout import conv_out_sizes, pixel_stride, to_nhwc

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cuda/params.h
_NO_VIEW = (0, 0)


@cache
def module() -> ModuleType | None:
    """The native module's `cuda` submodule, or None."""
    whole = native.module()
    return getattr(whole, "cuda", None) if whole else None


@cache
def properties(index: int):
    """What the plans know of a GPU."""
    return module().device(index)


@lru_cache(maxsize=4096)
def plan(
    kind: str,
    device: int,
    dtype: torch.dtype,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    channels: int = 0,
):
    """(native geometry, native plan, output size) of one op's shape.

    Raises:
        ValueError: no tile fits in the device's shared memory.
    """
    n, k, h, w = x
    c, _, r, s = weight
    size = tuple(conv_out_sizes((h, w), (r, s), stride, padding, dilation))
    geometry = module().Geometry((n, h, w, k), size, (c, r, s), stride, padding, dilation)
    extra = (channels,) if kind == "separable_fwd" else ()
    chosen = getattr(module(), f"plan_{kind}")(geometry, *extra, DTYPES[dtype], properties(device))
    return geometry, chosen, size


class Operands:
    """Turns tensors into pointers and keeps what it had to copy alive until the launch is queued."""

    def __init__(self):
        self._copies: list[Tensor] = []

    def _dense(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        if t.dtype != dtype or not t.is_contiguous():
            t = t.to(dtype).contiguous()
            self._copies.append(t)
        return t

    def view(self, t: Tensor | None) -> tuple[int, int]:
        """Pointer and pixel stride of an NHWC tensor or channel slice; others are converted."""
        if t is None:
            return _NO_VIEW
        ld = pixel_stride(t)
        if ld is None:
            t = to_nhwc(t)
            self._copies.append(t)
            ld = pixel_stride(t)
        return t.data_ptr(), ld

    def floats(self, t: Tensor | None) -> int:
        """Pointer of a contiguous float32 tensor."""
        return 0 if t is None else self._dense(t, torch.float32).data_ptr()

    def affine(self, scale: Tensor | None, shift: Tensor | None, act: int) -> tuple[int, int, int]:
        """A channel affine."""
        return self.floats(scale), self.floats(shift), act

    def filter(self, weight: Tensor, dtype: torch.dtype) -> tuple[int, bool]:
        """A depthwise weight: float32 stays, anything else becomes the op's dtype."""
        is_float32 = weight.dtype == torch.float32
        return self._dense(weight, weight.dtype if is_float32 else dtype).data_ptr(), is_float32

    def dense(self, t: Tensor, dtype: torch.dtype) -> int:
        """Pointer of a contiguous tensor in a dtype."""
        return self._dense(t, dtype).data_ptr()


def floats(size, like: Tensor) -> Tensor:
    """An uninitialised float32 tensor on like's device."""
    return torch.empty(size, dtype=torch.float32, device=like.device)


def address(t: Tensor | None) -> int:
    """A pointer, 0 for None or an empty tensor."""
    return 0 if t is None or t.numel() == 0 else t.data_ptr()


def stream(device: torch.device) -> int:
    """The current stream's handle."""
    return torch.cuda.current_stream(device).cuda_stream
