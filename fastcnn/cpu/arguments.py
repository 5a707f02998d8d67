"""Turns tensors into what the native module takes: pointers as integers (0 is null), sizes, dtype codes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn.ops.layout import conv_out_sizes, pixel_stride

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def pointer(x: Tensor | None) -> int:
    """The address of a tensor's first element, 0 for None."""
    return 0 if x is None else x.data_ptr()


def floats(v: Tensor | None) -> Tensor | None:
    """A per-channel vector or a small weight as contiguous float32 (kept alive by the caller)."""
    if v is None or (v.dtype is torch.float32 and not v.requires_grad and v.is_contiguous()):
        return v  # the hot path: three attribute reads instead of three torch calls
    return v.detach().to(torch.float32).contiguous()


def backward_output(
    dx: Tensor | None, dw: Tensor | None, sums: Tensor | None, residual: Tensor | None = None, scales: bool = False
) -> tuple:
    """A BackwardOutput; None is not asked for."""
    ld, residual_ld = (0 if t is None else pixel_stride(t) for t in (dx, residual))
    return pointer(dx), ld, pointer(dw), pointer(sums), pointer(residual), residual_ld, scales


def epilogue(
    scale: Tensor | None,
    shift: Tensor | None,
    act: int,
    residual: Tensor | None,
    out: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
) -> tuple:
    """(scale, shift, act, residual, residual_ld, out, out_ld, mean, var)."""
    residual_ld = 0 if residual is None else pixel_stride(residual)
    return (
        pointer(scale), pointer(shift), act, pointer(residual), residual_ld,
        out.data_ptr(), pixel_stride(out), pointer(mean), pointer(var),
    )  # fmt: skip


def statistics(channels: int, wanted: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for mean and variance [channels], or two empty tensors."""
    size = channels if wanted else 0
    return tuple(torch.empty(size, dtype=torch.float32, device=like.device) for _ in range(2))


def depthwise_shape(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    channels: int | None = None,
) -> tuple:
    """A DepthwiseShape; channels of its input where x is not that input but has its size."""
    images, own, h, w = x.shape
    channels = own if channels is None else channels
    kernel = weight.shape[2:]
    out = conv_out_sizes((h, w), kernel, stride, padding, dilation)
    return (
        images, channels, weight.shape[0] // channels, h, w, *out, *kernel, *stride, *padding, *dilation,
        DTYPE_CODES[x.dtype],
    )  # fmt: skip
