"""Depthwise-separable convolution with the intermediate kept in cache, tile by tile."""

from __future__ import annotations

from torch import Tensor

from fastcnn.ops.conv_chain import conv_chain
from fastcnn.ops.depthwise_conv2d import depthwise_fwd
from fastcnn.ops.fakes import convolution_fake
from fastcnn.ops.normalisation import Affine, BatchNorm
from fastcnn.ops.pointwise_conv2d import pointwise_fwd
from fastcnn.ops.registry import Pair, register
from fastcnn.ops.stages import Conv
from fastcnn.ops.validation import Labels, check_choice, pair


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


ORDERS = ("depthwise_first", "pointwise_first")

Norm = Affine | BatchNorm


def _norm(norm: Norm | None, scale: Tensor | None, shift: Tensor | None, name: str) -> Norm | None:
    if scale is None and shift is None:
        return norm
    if norm is not None:
        raise ValueError(f"{name}_norm: got one beside {name}_scale or {name}_shift, expected one or the other")
    return Affine(scale, shift)


def _labels(weights: tuple[str, ...], norm: Norm | None, name: str) -> Labels:
    whole = None if norm is None else f"{name}_norm"
    scale, shift = ("scale", "shift") if whole else (f"{name}_scale", f"{name}_shift")
    return Labels(weights, whole, scale, shift, f"{name}_act")


def separable_conv2d(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    in_act: str = "none",
    mid_scale: Tensor | None = None,
    mid_shift: Tensor | None = None,
    mid_norm: Norm | None = None,
    mid_act: str = "none",
    out_scale: Tensor | None = None,
    out_shift: Tensor | None = None,
    out_norm: Norm | None = None,
    out_act: str = "none",
    residual: Tensor | None = None,
    order: str = "depthwise_first",
) -> Tensor:
    """Depthwise-separable convolution as one fused, differentiable unit.

    y = out_act(out_norm(pointwise(mid_act(mid_norm(depthwise(in_act(x))))))) + residual

    With ``order="pointwise_first"`` the pointwise convolution runs before the depthwise one; ``mid`` is always what
    stands between the two and ``out`` what follows both. A normalisation is a scale and a shift per channel, or a
    ``BatchNorm``, whose batch statistics (the training form) are taken as the convolution stores and applied as the
    next one loads; its running statistics are updated in place.

    Shapes: x [N, K, H, W] in any memory format; depthwise first: dw_weight [K * multiplier, 1, R, S], pw_weight
    [C, K * multiplier, 1, 1]; pointwise first: pw_weight [M, K, 1, 1], dw_weight [M * multiplier, 1, R, S]. Stride,
    padding and dilation are the depthwise convolution's. The result and residual are [N, C, P, Q], channels_last.
    Dtypes: float32, bfloat16, float16, float64 (reference); half inputs also take float32 parameters.
    Activations: none, relu, relu6, silu, hardswish.
    Source: Xception (arXiv 1610.02357, section 3; both orders), MobileNet-v2 (arXiv 1801.04381).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device, or an unknown activation or order.
    """
    check_choice(order, "order", ORDERS)
    where = (pair(stride, "stride", 1), pair(padding, "padding", 0), pair(dilation, "dilation", 1))
    mid = _norm(mid_norm, mid_scale, mid_shift, "mid")
    out = _norm(out_norm, out_scale, out_shift, "out")
    tail = _labels(("pw_weight",), out_norm, "out")
    if order == "pointwise_first":
        convs = (
            Conv("pointwise", (pw_weight,), norm=mid, act=mid_act),
            Conv("depthwise", (dw_weight,), *where, norm=out, act=out_act),
        )
        labels = (_labels(("pw_weight",), mid_norm, "mid"), tail._replace(weights=("dw_weight",)))
    elif mid is None and mid_act in ("none", None):
        # One convolution with two weights: the intermediate is never stored, not even for the backward.
        convs = (Conv("separable", (dw_weight, pw_weight), *where, norm=out, act=out_act),)
        labels = (tail._replace(weights=("dw_weight", "pw_weight")),)
    else:
        convs = (
            Conv("depthwise", (dw_weight,), *where, norm=mid, act=mid_act),
            Conv("pointwise", (pw_weight,), norm=out, act=out_act),
        )
        labels = (_labels(("dw_weight",), mid_norm, "mid"), tail)
    return conv_chain(x, convs, in_act, residual, labels)
