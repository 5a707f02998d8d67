"""NHWC (channels_last) layout: the one layout that every kernel reads and writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def pixel_stride(x: Tensor) -> int | None:
    """Elements between neighbouring pixels of an NHWC tensor or channel slice [N, C, H, W]; None if x is neither.

    A channel slice of a larger NHWC buffer is dense in pixels but has a pixel stride above C.
    """
    n, c, h, w = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        return c  # one call to torch where the general answer takes six
    if c > 1 and x.stride(1) != 1:
        return None
    if w > 1:
        ld = x.stride(3)
    elif h > 1:
        ld = x.stride(2)
    elif n > 1:
        ld = x.stride(0)
    else:
        return c
    if ld < c or (h > 1 and x.stride(2) != w * ld) or (n > 1 and x.stride(0) != h * w * ld):
        return None
    return ld


def to_nhwc(x: Tensor) -> Tensor:
    """x itself when its memory is NHWC (or a channel slice of NHWC), else a channels_last copy."""
    if x.numel() == 0 or pixel_stride(x) is None:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def empty_nhwc(n: int, c: int, h: int, w: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last tensor [n, c, h, w] on like's device, in like's dtype unless given."""
    return torch.empty((n, c, h, w), dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def conv_out_sizes(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> list[int]:
    """[P, Q] of a convolution's or a pooling's output from an input's [H, W]."""
    return [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]


def pool_out_sizes(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> list[int]:
    """[P, Q] of a pooling's output; with ``ceil_mode`` also windows that begin before the image's end."""
    floor = conv_out_sizes(size, kernel, stride, padding)
    if not ceil_mode:
        return floor
    fits = [(n - 1) * s + k == i + 2 * p for n, i, k, s, p in zip(floor, size, kernel, stride, padding, strict=True)]
    begins = [n * s < i + p for n, i, s, p in zip(floor, size, stride, padding, strict=True)]
    return [n + (1 if begin and not fit else 0) for n, fit, begin in zip(floor, fits, begins, strict=True)]


def versions(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Where each tensor's memory is and how often it was written to; inference mode's tensors do not count that."""
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast asks for on x's device; x's own without it, and for float64."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast asks for on its device."""
    return x.to(autocast_dtype(x))
