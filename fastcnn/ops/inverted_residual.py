"""MobileNet-v2's block as one kernel: pointwise expand, depthwise, pointwise project, add (inference form)."""

from __future__ import annotations

from torch import Tensor

from fastcnn.ops.conv_chain import conv_chain
from fastcnn.ops.depthwise_conv2d import depthwise_fwd
from fastcnn.ops.fakes import convolution_fake
from fastcnn.ops.normalisation import Affine, BatchNorm
from fastcnn.ops.pointwise_conv2d import pointwise_fwd
from fastcnn.ops.registry import Pair, register
from fastcnn.ops.separable_conv2d import separable_fwd
from fastcnn.ops.stages import Conv
from fastcnn.ops.validation import Labels, pair


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


_LABELS = tuple(Labels((f"{part}_weight",), f"{part}_norm", act="act") for part in ("expand", "dw", "project"))


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor | None,
    dw_weight: Tensor,
    project_weight: Tensor,
    *,
    expand_norm: Affine | BatchNorm | None = None,
    dw_norm: Affine | BatchNorm | None = None,
    project_norm: Affine | BatchNorm | None = None,
    act: str = "relu6",
    stride: int | Pair = 1,
    padding: int | Pair = 1,
    dilation: int | Pair = 1,
    residual: Tensor | None = None,
) -> Tensor:
    """MobileNet-v2's block as one fused, differentiable unit.

    y = project_norm(project(act(dw_norm(depthwise(act(expand_norm(expand(x)))))))) + residual

    Shapes: x [N, K, H, W] in any memory format, expand_weight [M, K, 1, 1] (None: no expansion, M = K), dw_weight
    [M, 1, R, S], project_weight [C, M, 1, 1]; the result and residual are [N, C, P, Q], channels_last.
    Dtypes: float32, bfloat16, float16, float64 (reference); half inputs also take float32 parameters.
    Source: MobileNet-v2 (arXiv 1801.04381, section 3.3 and table 1).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device, or an unknown activation.
    """
    where = (pair(stride, "stride", 1), pair(padding, "padding", 0), pair(dilation, "dilation", 1))
    convs = (
        Conv("pointwise", (expand_weight,), norm=expand_norm, act=act),
        Conv("depthwise", (dw_weight,), *where, norm=dw_norm, act=act),
        Conv("pointwise", (project_weight,), norm=project_norm),
    )
    skipped = 0 if expand_weight is not None else 1
    return conv_chain(x, convs[skipped:], "none", residual, _LABELS[skipped:])
