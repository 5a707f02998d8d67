"""Scale-shift-activation-residual in C++ and its backward: passes over memory at the ends of a chain."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, epilogue, floats, pointer, statistics
from fastcnn.cpu.memory import empty_nhwc
from fastcnn.ops.layout import pixel_stride, to_nhwc
from fastcnn.ops.registry import Mutable


def affine_act_fwd(y: Tensor, scale: Tensor | None, shift: Tensor | None, act: int, residual: Tensor | None) -> Tensor:
    """As fastcnn.ops.affine_act.affine_act_fwd."""
    out = empty_nhwc(*y.shape, like=y)
    affine_act_into(out, y, scale, shift, act, residual)
    return out


def affine_act_into(
    out: Mutable, y: Tensor, scale: Tensor | None, shift: Tensor | None, act: int, residual: Tensor | None
) -> None:
    """As fastcnn.ops.affine_act.affine_act_into."""
    y = to_nhwc(y)
    residual = None if residual is None else to_nhwc(residual)
    scale, shift = floats(scale), floats(shift)
    n, channels, h, w = y.shape
    native.module().affine_act_forward(
        n * h * w, channels, DTYPE_CODES[y.dtype], y.data_ptr(), pixel_stride(y),
        epilogue(scale, shift, act, residual, out),
    )  # fmt: skip


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


def affine_act_dgrad(
    grad: Tensor,
    y: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: int,
    coef: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """As fastcnn.ops.affine_act.affine_act_dgrad."""
    grad, y = to_nhwc(grad), to_nhwc(y)
    residual = None if residual is None else to_nhwc(residual)
    scale, shift, coef = floats(scale), floats(shift), floats(coef)
    n, channels, h, w = y.shape
    dx = empty_nhwc(n, channels, h, w, like=grad)
    native.module().affine_act_data_gradient(
        n * h * w, channels, DTYPE_CODES[y.dtype],
        (grad.data_ptr(), pixel_stride(grad), y.data_ptr(), pixel_stride(y),
         pointer(scale), pointer(shift), act, pointer(coef)),
        pointer(residual), 0 if residual is None else pixel_stride(residual), dx.data_ptr(), channels,
    )  # fmt: skip
    return dx


def residual_act_bwd(
    grad: Tensor, out: Tensor, act: int, y: Tensor, mean: Tensor | None, need_sums: bool
) -> tuple[Tensor, Tensor]:
    """As fastcnn.ops.affine_act.residual_act_bwd."""
    grad, out, y, mean = to_nhwc(grad), to_nhwc(out), to_nhwc(y), floats(mean)
    n, channels, h, w = grad.shape
    dz = empty_nhwc(n, channels, h, w, like=grad)
    sums = torch.empty((2, channels) if need_sums else (0,), dtype=torch.float32)
    native.module().residual_act_backward(
        n * h * w, channels, DTYPE_CODES[grad.dtype], grad.data_ptr(), pixel_stride(grad), out.data_ptr(),
        pixel_stride(out), act, y.data_ptr(), pixel_stride(y), pointer(mean), dz.data_ptr(), channels,
        sums.data_ptr() if need_sums else 0,
    )  # fmt: skip
    return dz, sums


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """As fastcnn.ops.affine_act.channel_statistics."""
    x = to_nhwc(x)
    n, channels, h, w = x.shape
    mean, var = statistics(channels, True, x)
    native.module().channel_statistics(
        n * h * w, channels, DTYPE_CODES[x.dtype], x.data_ptr(), pixel_stride(x), mean.data_ptr(), var.data_ptr()
    )
    return mean, var
