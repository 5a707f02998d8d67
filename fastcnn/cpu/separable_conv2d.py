"""Fused depthwise-separable convolution and MobileNet-v2's block on the C++ kernels."""

from __future__ import annotations

from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import depthwise_shape, epilogue, floats, pointer, statistics
from fastcnn.cpu.memory import empty_nhwc
from fastcnn.cpu.packing import PackedWeight, packed_forward
from fastcnn.ops.layout import pixel_stride, to_nhwc

Pair = tuple[int, int]


def separable_fwd(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor | PackedWeight,
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
    """As fastcnn.ops.separable_conv2d.separable_fwd; the pointwise weight may be packed."""
    x = to_nhwc(x)
    residual = None if residual is None else to_nhwc(residual)
    in_scale, in_shift, mid_scale, mid_shift = map(floats, (in_scale, in_shift, mid_scale, mid_shift))
    out_scale, out_shift, dw_weight = map(floats, (out_scale, out_shift, dw_weight))
    shape, n = depthwise_shape(x, dw_weight, stride, padding, dilation), pw_weight.shape[0]
    y = empty_nhwc(x.shape[0], n, shape[5], shape[6], like=x)
    mean, var = statistics(n, stats, x)
    packed = packed_forward(pw_weight, x.dtype)
    native.module().separable_forward(
        shape, x.data_ptr(), pixel_stride(x), (pointer(in_scale), pointer(in_shift), in_act),
        dw_weight.data_ptr(), (pointer(mid_scale), pointer(mid_shift), mid_act), n, packed.data_ptr(),
        epilogue(out_scale, out_shift, out_act, residual, y, mean if stats else None, var),
    )  # fmt: skip
    return y, mean, var


def inverted_residual_fwd(
    x: Tensor,
    expand_weight: Tensor | PackedWeight,
    dw_weight: Tensor,
    project_weight: Tensor | PackedWeight | None,
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
    """As fastcnn.ops.inverted_residual.inverted_residual_fwd; the pointwise weights may be packed.

    Only a depth multiplier of 1 (fastcnn.cpu.refuses says so of others).
    """
    x = to_nhwc(x)
    residual = None if residual is None else to_nhwc(residual)
    vectors = (
        in_scale,
        in_shift,
        expand_scale,
        expand_shift,
        dw_scale,
        dw_shift,
        project_scale,
        project_shift,
    )
    vectors = [floats(v) for v in vectors]
    head, expand, middle, tail = (
        (pointer(vectors[2 * i]), pointer(vectors[2 * i + 1]), act)
        for i, act in enumerate((in_act, expand_act, dw_act, project_act))
    )
    dw_weight = floats(dw_weight)
    channels = dw_weight.shape[0]
    shape = depthwise_shape(x, dw_weight, stride, padding, dilation, channels=channels)
    n = channels if project_weight is None else project_weight.shape[0]
    y = empty_nhwc(x.shape[0], n, shape[5], shape[6], like=x)
    packed_expand = packed_forward(expand_weight, x.dtype)
    packed_project = None if project_weight is None else packed_forward(project_weight, x.dtype)
    residual_ld = 0 if residual is None else pixel_stride(residual)
    native.module().inverted_residual_forward(
        x.shape[1], shape, x.data_ptr(), pixel_stride(x), head, packed_expand.data_ptr(), expand,
        dw_weight.data_ptr(), middle, n, pointer(packed_project),
        (*tail, pointer(residual), residual_ld, y.data_ptr(), pixel_stride(y), 0, 0),
    )  # fmt: skip
    return y
