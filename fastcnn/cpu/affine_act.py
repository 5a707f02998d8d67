"""Scale-shift-activation-residual in C++, and the two sums of its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, epilogue, floats, pointer
from fastcnn.cpu.memory import empty_nhwc
from fastcnn.ops.layout import pixel_stride, to_nhwc


def affine_act_fwd(y: Tensor, scale: Tensor | None, shift: Tensor | None, act: int, residual: Tensor | None) -> Tensor:
    """As fastcnn.ops.affine_act.affine_act_fwd."""
    y = to_nhwc(y)
    residual = None if residual is None else to_nhwc(residual)
    scale, shift = floats(scale), floats(shift)
    n, channels, h, w = y.shape
    out = empty_nhwc(n, channels, h, w, like=y)
    native.module().affine_act_forward(
        n * h * w, channels, DTYPE_CODES[y.dtype], y.data_ptr(), pixel_stride(y),
        epilogue(scale, shift, act, residual, out),
    )  # fmt: skip
    return out


def affine_act_sums(
    grad: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None, act: int, mean: Tensor | None
) -> Tensor:
    """As fastcnn.ops.affine_act.affine_act_sums."""
    grad, y = to_nhwc(grad), to_nhwc(y)
    scale, shift, mean = floats(scale), floats(shift), floats(mean)
    n, channels, h, w = y.shape
    sums = torch.empty((2, channels), dtype=torch.float32)
    native.module().affine_act_sums(
        n * h * w, channels, DTYPE_CODES[y.dtype], grad.data_ptr(), pixel_stride(grad), y.data_ptr(),
        pixel_stride(y), (pointer(scale), pointer(shift), act), pointer(mean), sums.data_ptr(),
    )  # fmt: skip
    return sums
