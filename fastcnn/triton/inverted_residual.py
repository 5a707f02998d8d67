"""MobileNet-v2's block (inference form): pointwise expand, then the fused separable kernel.

The expanded image is written once: to make it inside the separable kernel every tile would expand its halo again, which
for 3 x 3 and 8 x 16 pixels is 1.4 times the products of the dearest layer.
"""

from __future__ import annotations

from torch import Tensor

from fastcnn.triton.depthwise_conv2d import depthwise_fwd
from fastcnn.triton.launch import primitive
from fastcnn.triton.pointwise_conv2d import pointwise_fwd
from fastcnn.triton.separable_conv2d import separable_fwd

Pair = tuple[int, int]


@primitive
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
    middle, geometry = (dw_scale, dw_shift, dw_act), (stride, padding, dilation, False)
    if project_weight is None:
        return depthwise_fwd(hidden, dw_weight, None, None, 0, *middle, residual, *geometry)[0]
    tail = (project_scale, project_shift, project_act)
    return separable_fwd(hidden, dw_weight, project_weight, None, None, 0, *middle, *tail, residual, *geometry)[0]
