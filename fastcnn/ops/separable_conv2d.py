"""Depthwise-separable convolution with the intermediate kept in cache, tile by tile."""

from __future__ import annotations

from torch import Tensor

from fastcnn.ops.depthwise_conv2d import depthwise_fwd
from fastcnn.ops.fakes import convolution_fake
from fastcnn.ops.pointwise_conv2d import pointwise_fwd
from fastcnn.ops.registry import Pair, register


def _forward_fake(x, dw_weight, pw_weight, *rest):
    stride, padding, dilation, stats = rest[-4:]
    mid, _, _ = convolution_fake(x, dw_weight, stride, padding, dilation, False)
    return convolution_fake(mid, pw_weight, (1, 1), (0, 0), (1, 1), stats)


@register(_forward_fake)
def separable_fwd(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    mid_scale: Tensor | None,
    mid_shift: Tensor | None,
    mid_act: int,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    out_act: int,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise, scale-shift-activation, pointwise, scale-shift-activation, residual. Returns y, mean, var."""
    mid, _, _ = depthwise_fwd(
        x, dw_weight, in_scale, in_shift, in_act, mid_scale, mid_shift, mid_act, None,
        stride, padding, dilation, False,
    )  # fmt: skip
    return pointwise_fwd(
        mid, pw_weight, None, None, 0, out_scale, out_shift, out_act, residual, (1, 1), stats
    )  # fmt: skip
