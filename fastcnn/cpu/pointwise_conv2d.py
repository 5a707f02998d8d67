"""Pointwise convolution on the C++ matrix-product core."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, backward_output, epilogue, floats, pointer, statistics
from fastcnn.cpu.memory import empty_nhwc
from fastcnn.cpu.packing import PackedWeight, packed_dgrad, packed_forward
from fastcnn.ops.layout import conv_out_sizes, pixel_stride, to_nhwc
from fastcnn.ops.registry import Mutable

Pair = tuple[int, int]
_ONE = (1, 1)


def _grid(x: Tensor, stride: Pair) -> tuple:
    n, _, h, w = x.shape
    return n, h, w, *conv_out_sizes((h, w), _ONE, stride, (0, 0)), *stride


def pointwise_fwd(
    x: Tensor,
    weight: Tensor | PackedWeight,
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
    """As fastcnn.ops.pointwise_conv2d.pointwise_fwd; the weight may be packed."""
    size = conv_out_sizes(x.shape[2:], _ONE, stride, (0, 0))
    y = empty_nhwc(x.shape[0], weight.shape[0], *size, like=x)
    head, tail = (in_scale, in_shift, in_act), (out_scale, out_shift, out_act)
    return y, *pointwise_into(y, x, weight, *head, *tail, residual, stride, stats)


def pointwise_into(
    out: Mutable,
    x: Tensor,
    weight: Tensor | PackedWeight,
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
    """As fastcnn.ops.pointwise_conv2d.pointwise_into; the weight may be packed."""
    x = to_nhwc(x)
    residual = None if residual is None else to_nhwc(residual)
    in_scale, in_shift, out_scale, out_shift = map(floats, (in_scale, in_shift, out_scale, out_shift))
    channels = weight.shape[0]
    mean, var = statistics(channels, stats, x)
    packed = packed_forward(weight, x.dtype)
    native.module().pointwise_forward(
        _grid(x, stride), x.shape[1], channels, DTYPE_CODES[x.dtype], x.data_ptr(), pixel_stride(x),
        (pointer(in_scale), pointer(in_shift), in_act), packed.data_ptr(),
        epilogue(out_scale, out_shift, out_act, residual, out, mean if stats else None, var),
    )  # fmt: skip
    return mean, var


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
    """As fastcnn.ops.pointwise_conv2d.pointwise_bwd."""
    dx = empty_nhwc(*x.shape, like=grad) if need_dx else grad.new_empty(0)
    dw, sums = _backward(
        (grad, y, y_scale, y_shift, y_act, coef), (x, x_scale, x_shift, x_act, x_mean), weight, stride,
        dx if need_dx else None, residual, need_dw, need_sums,
    )  # fmt: skip
    return dx, dw, sums


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
    """As fastcnn.ops.pointwise_conv2d.pointwise_bwd_into."""
    upstream, source = (grad, y, y_scale, y_shift, y_act, coef), (x, x_scale, x_shift, x_act, x_mean)
    return _backward(upstream, source, weight, (1, 1), dx, dx, need_dw, need_sums, scales=True)


def _backward(
    upstream: tuple,
    source: tuple,
    weight: Tensor,
    stride: Pair,
    dx: Tensor | None,
    residual: Tensor | None,
    need_dw: bool,
    need_sums: bool,
    scales: bool = False,
) -> tuple[Tensor, Tensor]:
    """dw and sums; dx is written where it is not None."""
    grad, y, y_scale, y_shift, y_act, coef = upstream
    x, x_scale, x_shift, x_act, x_mean = source
    grad, x = to_nhwc(grad), to_nhwc(x)
    y, residual = (None if t is None else to_nhwc(t) for t in (y, residual))
    vectors = [floats(v) for v in (y_scale, y_shift, coef, x_scale, x_shift, x_mean)]
    y_scale, y_shift, coef, x_scale, x_shift, x_mean = vectors
    channels, k = weight.shape[:2]
    dw = torch.empty(weight.shape if need_dw else (0,), dtype=torch.float32)
    sums = torch.empty((2, k) if need_sums else (0,), dtype=torch.float32)
    packed = None if dx is None else packed_dgrad(weight, x.dtype)
    native.module().pointwise_backward(
        _grid(x, stride), k, channels, DTYPE_CODES[x.dtype],
        (grad.data_ptr(), pixel_stride(grad), pointer(y), 0 if y is None else pixel_stride(y),
         pointer(y_scale), pointer(y_shift), y_act, pointer(coef)),
        (x.data_ptr(), pixel_stride(x), pointer(x_scale), pointer(x_shift), x_act, pointer(x_mean)),
        pointer(packed),
        backward_output(dx, dw if need_dw else None, sums if need_sums else None, residual, scales),
    )  # fmt: skip
    return dw, sums
