"""Average pooling in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, floats, pointer
from fastcnn.cpu.memory import empty_nhwc
from fastcnn.ops.layout import conv_out_sizes, pixel_stride, to_nhwc

Pair = tuple[int, int]


def _shape(size: tuple[int, ...], like: Tensor, kernel: Pair, stride: Pair, padding: Pair, counts_padding: bool):
    n, c, *own = size
    out = conv_out_sizes(own, kernel, stride, padding)
    return n, c, *own, *out, *kernel, *stride, *padding, counts_padding, DTYPE_CODES[like.dtype]


def avg_pool2d_fwd(
    x: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    counts_padding: bool,
) -> Tensor:
    """As fastcnn.ops.avg_pool2d.avg_pool2d_fwd."""
    x, in_scale, in_shift = to_nhwc(x), floats(in_scale), floats(in_shift)
    shape = _shape(tuple(x.shape), x, kernel, stride, padding, counts_padding)
    out = empty_nhwc(*shape[:2], *shape[4:6], like=x)
    native.module().avg_pool2d_forward(
        shape, x.data_ptr(), pixel_stride(x), (pointer(in_scale), pointer(in_shift), in_act), out.data_ptr(),
        out.shape[1],
    )  # fmt: skip
    return out


def avg_pool2d_bwd(
    grad: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_act: int,
    x_mean: Tensor | None,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    counts_padding: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    """As fastcnn.ops.avg_pool2d.avg_pool2d_bwd."""
    grad, size = to_nhwc(grad), tuple(x.shape)
    x = to_nhwc(x) if x_act or need_sums else None  # its values are not read elsewhere
    x_scale, x_shift, x_mean = floats(x_scale), floats(x_shift), floats(x_mean)
    dx = empty_nhwc(*size, like=grad)
    sums = torch.empty((2, size[1]) if need_sums else (0,), dtype=torch.float32)
    native.module().avg_pool2d_backward(
        _shape(size, grad, kernel, stride, padding, counts_padding), grad.data_ptr(), pixel_stride(grad),
        (pointer(x), 0 if x is None else pixel_stride(x), pointer(x_scale), pointer(x_shift), x_act, pointer(x_mean)),
        dx.data_ptr(), size[1], sums.data_ptr() if need_sums else 0,
    )  # fmt: skip
    return dx, sums
