"""Pointwise (1x1) convolution: a matrix product with prologue and epilogue."""

from __future__ import annotations

from torch import Tensor

from fastcnn.ops.conv2d import conv2d_bwd, conv2d_fwd
from fastcnn.ops.conv_chain import Conv, conv_chain
from fastcnn.ops.fakes import convolution_backward_fake, convolution_fake
from fastcnn.ops.registry import Pair, register
from fastcnn.ops.validation import Labels, pair


def _forward_fake(x, weight, *rest):
    stride, stats = rest[-2:]
    return convolution_fake(x, weight, stride, (0, 0), (1, 1), stats)


def _backward_fake(grad, y, y_scale, y_shift, y_act, coef, x, x_scale, x_shift, x_act, x_mean, weight, *rest):
    return convolution_backward_fake(grad, x, weight, *rest[-3:])


@register(_forward_fake)
def pointwise_fwd(
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
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """1x1 convolution with prologue and epilogue; weight [C, K, 1, 1]. Returns y, mean, var."""
    return conv2d_fwd(
        x, weight, in_scale, in_shift, in_act, out_scale, out_shift, out_act, residual,
        stride, (0, 0), (1, 1), 1, stats,
    )  # fmt: skip


@register(_backward_fake)
def pointwise_bwd(
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
    need_dx: bool,
    need_dw: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of pointwise_fwd. Returns dx, dw [C, K, 1, 1], sums."""
    return conv2d_bwd(
        grad, y, y_scale, y_shift, y_act, coef, x, x_scale, x_shift, x_act, x_mean, weight, residual,
        stride, (0, 0), (1, 1), 1, need_dx, need_dw, need_sums,
    )  # fmt: skip


_LABELS = (Labels(),)


def pointwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | Pair = 1) -> Tensor:
    """1x1 convolution, differentiable: a matrix product over the channels of each pixel.

    Shapes: x [N, K, H, W] in any memory format, weight [C, K, 1, 1], bias [C]; the result [N, C, P, Q] is
    channels_last. Dtypes: float32, bfloat16, float16, float64 (reference); half inputs also take float32 parameters.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
    """
    conv = Conv("pointwise", (weight,), pair(stride, "stride", 1), bias=bias)
    return conv_chain(x, (conv,), labels=_LABELS)
