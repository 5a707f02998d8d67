"""Pointwise (1x1) convolution: a matrix product with prologue and epilogue."""

from __future__ import annotations

from torch import Tensor

from fastcnn.ops.conv2d import conv2d_bwd, conv2d_fwd
from fastcnn.ops.conv_chain import conv_chain
from fastcnn.ops.fakes import convolution_backward_fake, convolution_fake, convolution_into_fake
from fastcnn.ops.registry import Mutable, Pair, register
from fastcnn.ops.stages import Conv
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


@register(convolution_into_fake)
def pointwise_into(
    out: Mutable,
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
) -> tuple[Tensor, Tensor]:
    """pointwise_fwd with its output written to ``out``, a channel slice of an NHWC buffer. Returns mean, var."""
    y, mean, var = pointwise_fwd(
        x, weight, in_scale, in_shift, in_act, out_scale, out_shift, out_act, residual, stride, stats
    )
    out.copy_(y)
    return mean, var


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


def _into_fake(dx, grad, y, y_scale, y_shift, y_act, coef, x, x_scale, x_shift, x_act, x_mean, weight, *rest):
    _, dw, sums = convolution_backward_fake(grad, x, weight, False, *rest)
    return dw, sums


@register(_into_fake)
def pointwise_bwd_into(
    dx: Mutable,
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
    need_dw: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    """pointwise_bwd of stride 1 that adds x_scale * dx to ``dx``, a channel slice of an NHWC buffer. Returns dw, sums.

    What is added is the gradient of x, but for the share of x's batch statistics: that is affine in x per channel, needs
    the sums, and is left to the reader of the buffer (dense_block).
    """
    own, dw, sums = pointwise_bwd(
        grad, y, y_scale, y_shift, y_act, coef, x, x_scale, x_shift, x_act, x_mean, weight, None,
        (1, 1), True, need_dw, need_sums,
    )  # fmt: skip
    dx.add_(own if x_scale is None else (own * x_scale.view(1, -1, 1, 1)).to(dx.dtype))
    return dw, sums


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
