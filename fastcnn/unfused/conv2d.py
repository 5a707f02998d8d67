"""torch's convolution with the prologue and the epilogue as passes over memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.cpu.affine_act import affine_act_dgrad, affine_act_fwd, affine_act_sums, channel_statistics
from fastcnn.cpu.packing import source
from fastcnn.ops.layout import to_nhwc

Pair = tuple[int, int]


def _prologue(x: Tensor, scale: Tensor | None, shift: Tensor | None, act: int) -> Tensor:
    if scale is not None or shift is not None or act:
        return affine_act_fwd(x, scale, shift, act, None)
    x = to_nhwc(x)
    if x.shape[1] > 1:
        return x
    # One channel lies alike in both formats; torch takes the output's from the strides.
    h, w = x.shape[2:]
    return x.as_strided(x.shape, (h * w, 1, w, 1))


def conv2d_fwd(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    out_act: int,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As fastcnn.ops.conv2d.conv2d_fwd."""
    a = _prologue(x, in_scale, in_shift, in_act)
    bias = None
    if out_scale is None and not stats:
        bias, out_shift = out_shift, None
    bias = None if bias is None else bias.to(a.dtype)
    y = to_nhwc(F.conv2d(a, source(weight).to(a.dtype), bias, stride, padding, dilation, groups))
    if stats and (out_scale is not None or out_shift is not None):
        y, out_scale, out_shift = affine_act_fwd(y, out_scale, out_shift, 0, None), None, None
    mean, var = channel_statistics(y) if stats else (y.new_empty(0, dtype=torch.float32) for _ in range(2))
    if out_scale is not None or out_shift is not None or out_act or residual is not None:
        y = affine_act_fwd(y, out_scale, out_shift, out_act, residual)
    return y, mean, var


def depthwise_fwd(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    out_act: int,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As fastcnn.ops.depthwise_conv2d.depthwise_fwd."""
    return conv2d_fwd(
        x, weight, in_scale, in_shift, in_act, out_scale, out_shift, out_act, residual,
        stride, padding, dilation, x.shape[1], stats,
    )  # fmt: skip


def conv2d_bwd(
    grad: Tensor,
    y: Tensor | None,
    y_scale: Tensor | None,
    y_shift: Tensor | None,
    y_act: int,
    coef: Tensor | None,
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_act: int,
    x_mean: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    need_dx: bool,
    need_dw: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As fastcnn.ops.conv2d.conv2d_bwd; dw has the weight's memory format."""
    dy = to_nhwc(grad) if y is None else affine_act_dgrad(grad, y, y_scale, y_shift, y_act, coef, None)
    a = _prologue(x, x_scale, x_shift, x_act)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, a, source(weight).to(a.dtype), None, stride, padding, dilation, False, [0, 0], groups,
        [need_dx, need_dw, False],
    )  # fmt: skip
    empty = torch.empty(0, dtype=torch.float32)
    dw = torch.empty_like(weight, dtype=torch.float32).copy_(dw) if need_dw else empty
    if not need_dx:
        return grad.new_empty(0), dw, empty
    dx = to_nhwc(dx)
    sums = affine_act_sums(dx, x, x_scale, x_shift, x_act, x_mean) if need_sums else empty
    if x_act or residual is not None:
        mask = (x, x_scale, x_shift, x_act) if x_act else (dx, None, None, 0)
        dx = affine_act_dgrad(dx, *mask, None, residual)
    return dx, dw, sums
