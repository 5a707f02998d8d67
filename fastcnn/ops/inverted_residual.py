"""MobileNet-v2's block as one kernel: pointwise expand, depthwise, pointwise project, add (inference form)."""

from __future__ import annotations

from torch import Tensor

from fastcnn.ops.depthwise_conv2d import depthwise_fwd
from fastcnn.ops.fakes import convolution_fake
from fastcnn.ops.pointwise_conv2d import pointwise_fwd
from fastcnn.ops.registry import Pair, register
from fastcnn.ops.separable_conv2d import separable_fwd


def _forward_fake(x, expand_weight, dw_weight, project_weight, *rest):
    stride, padding, dilation = rest[-3:]
    hidden, _, _ = convolution_fake(x, expand_weight, (1, 1), (0, 0), (1, 1), False)
    y, _, _ = convolution_fake(hidden, dw_weight, stride, padding, dilation, False)
    return y if project_weight is None else convolution_fake(y, project_weight, (1, 1), (0, 0), (1, 1), False)[0]


@register(_forward_fake)
def inverted_residual_fwd(
    x: Tensor,
    expand_weight: Tensor,
    dw_weight: Tensor,
    project_weight: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    expand_scale: Tensor | None,
    expand_shift: Tensor | None,
    expand_act: int,
    dw_scale: Tensor | None,
    dw_shift: Tensor | None,
    dw_act: int,
    project_scale: Tensor | None,
    project_shift: Tensor | None,
    project_act: int,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Pointwise, depthwise, pointwise (MobileNet-v2's block), or pointwise, depthwise when project_weight is None."""
    hidden, _, _ = pointwise_fwd(
        x, expand_weight, in_scale, in_shift, in_act, expand_scale, expand_shift, expand_act, None, (1, 1), False
    )
    if project_weight is None:
        return depthwise_fwd(
            hidden, dw_weight, None, None, 0, dw_scale, dw_shift, dw_act, residual,
            stride, padding, dilation, False,
        )[0]  # fmt: skip
    return separable_fwd(
        hidden, dw_weight, project_weight, None, None, 0, dw_scale, dw_shift, dw_act,
        project_scale, project_shift, project_act, residual, stride, padding, dilation, False,
    )[0]  # fmt: skip
