"""Depthwise convolution: a stencil per channel with prologue and epilogue."""

from __future__ import annotations

from torch import Tensor

from fastcnn.ops.conv2d import conv2d_bwd, conv2d_fwd
from fastcnn.ops.conv_chain import conv_chain
from fastcnn.ops.fakes import convolution_backward_fake, convolution_fake
from fastcnn.ops.registry import Pair, register
from fastcnn.ops.stages import Conv
from fastcnn.ops.validation import Labels, pair


def _forward_fake(x, weight, *rest):
    stride, padding, dilation, stats = rest[-4:]
    return convolution_fake(x, weight, stride, padding, dilation, stats)


def _backward_fake(grad, y, y_scale, y_shift, y_act, coef, x, x_scale, x_shift, x_act, x_mean, weight, *rest):
    return convolution_backward_fake(grad, x, weight, *rest[-3:])


@register(_forward_fake)
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
    """Depthwise convolution with prologue and epilogue; weight [K * multiplier, 1, R, S]. Returns y, mean, var."""
    return conv2d_fwd(
        x, weight, in_scale, in_shift, in_act, out_scale, out_shift, out_act, residual,
        stride, padding, dilation, x.shape[1], stats,
    )  # fmt: skip


@register(_backward_fake)
def depthwise_bwd(
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
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    need_dx: bool,
    need_dw: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of depthwise_fwd. Returns dx, dw [K * multiplier, 1, R, S], sums."""
    return conv2d_bwd(
        grad, y, y_scale, y_shift, y_act, coef, x, x_scale, x_shift, x_act, x_mean, weight, None,
        stride, padding, dilation, x.shape[1], need_dx, need_dw, need_sums,
    )  # fmt: skip


_LABELS = (Labels(),)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
) -> Tensor:
    """Depthwise convolution, differentiable: each channel has its own ``multiplier`` filters.

    Shapes: x [N, K, H, W] in any memory format, weight [K * multiplier, 1, R, S] with R and S odd and at most 31,
    bias [K * multiplier]; the result [N, K * multiplier, P, Q] is channels_last. Output channel c reads input channel
    c // multiplier, as torch's grouped convolution does.
    Dtypes: float32, bfloat16, float16, float64 (reference); half inputs also take float32 parameters.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
    """
    where = (pair(stride, "stride", 1), pair(padding, "padding", 0), pair(dilation, "dilation", 1))
    return conv_chain(x, (Conv("depthwise", (weight,), *where, bias=bias),), labels=_LABELS)
