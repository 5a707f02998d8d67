"""Depthwise convolution in C++: a stencil per channel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, backward_output, epilogue, floats, pointer, statistics
from fastcnn.cpu.memory import empty_nhwc
from fastcnn.ops.layout import conv_out_sizes, pixel_stride, to_nhwc

Pair = tuple[int, int]


def depthwise_shape(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> tuple:
    """(images, channels, multiplier, in_h, in_w, out_h, out_w, kernel, stride, padding, dilation, dtype)."""
    n, k, h, w = x.shape
    kernel = weight.shape[2:]
    out_h, out_w = conv_out_sizes((h, w), kernel, stride, padding, dilation)
    multiplier = weight.shape[0] // k
    return n, k, multiplier, h, w, out_h, out_w, *kernel, *stride, *padding, *dilation, DTYPE_CODES[x.dtype]


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
    """As fastcnn.ops.depthwise_conv2d.depthwise_fwd."""
    x = to_nhwc(x)
    residual = None if residual is None else to_nhwc(residual)
    vectors = [floats(v) for v in (weight, in_scale, in_shift, out_scale, out_shift)]
    weight, in_scale, in_shift, out_scale, out_shift = vectors
    shape, channels = depthwise_shape(x, weight, stride, padding, dilation), weight.shape[0]
    y = empty_nhwc(x.shape[0], channels, shape[5], shape[6], like=x)
    mean, var = statistics(channels, stats, x)
    native.module().depthwise_forward(
        shape, x.data_ptr(), pixel_stride(x), (pointer(in_scale), pointer(in_shift), in_act), weight.data_ptr(),
        epilogue(out_scale, out_shift, out_act, residual, y, mean if stats else None, var),
    )  # fmt: skip
    return y, mean, var


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
    """As fastcnn.ops.depthwise_conv2d.depthwise_bwd."""
    grad, x = to_nhwc(grad), to_nhwc(x)
    y = None if y is None else to_nhwc(y)
    vectors = [floats(v) for v in (y_scale, y_shift, coef, x_scale, x_shift, x_mean, weight)]
    y_scale, y_shift, coef, x_scale, x_shift, x_mean, weight = vectors
    dx = empty_nhwc(*x.shape, like=grad) if need_dx else grad.new_empty(0)
    need_sums = need_sums and need_dx
    dw = torch.empty(weight.shape if need_dw else (0,), dtype=torch.float32)
    sums = torch.empty((2, x.shape[1]) if need_sums else (0,), dtype=torch.float32)
    native.module().depthwise_backward(
        depthwise_shape(x, weight, stride, padding, dilation),
        (grad.data_ptr(), pixel_stride(grad), pointer(y), 0 if y is None else pixel_stride(y),
         pointer(y_scale), pointer(y_shift), y_act, pointer(coef)),
        (x.data_ptr(), pixel_stride(x), pointer(x_scale), pointer(x_shift), x_act, pointer(x_mean)),
        weight.data_ptr(),
        backward_output(dx if need_dx else None, dw if need_dw else None, sums if need_sums else None),
    )  # fmt: skip
    return dx, dw, sums
