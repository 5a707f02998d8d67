"""Maximum pooling on the C++ kernels."""

from __future__ import annotations

from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES
from fastcnn.cpu.memory import empty_nhwc
from fastcnn.ops.layout import conv_out_size, pixel_stride, to_nhwc

Pair = tuple[int, int]


def max_pool2d_fwd(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """As fastcnn.ops.max_pool2d.max_pool2d_fwd."""
    x = to_nhwc(x)
    n, c, *size = x.shape
    out = [conv_out_size(size[i], kernel[i], stride[i], padding[i], 1) for i in (0, 1)]
    y = empty_nhwc(n, c, *out, like=x)
    native.module().max_pool2d_forward(
        (n, c, *size, *out, *kernel, *stride, *padding, DTYPE_CODES[x.dtype]),
        x.data_ptr(), pixel_stride(x), y.data_ptr(), c,
    )  # fmt: skip
    return y
