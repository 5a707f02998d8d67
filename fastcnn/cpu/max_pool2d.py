"""Maximum pooling on the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES
from fastcnn.cpu.memory import empty_nhwc
from fastcnn.ops.layout import pixel_stride, pool_out_sizes, to_nhwc
from fastcnn.ops.registry import Mutable

Pair = tuple[int, int]


def _geometry(like: Tensor, size: Pair, out: Pair, kernel: Pair, stride: Pair, padding: Pair) -> tuple:
    return (*like.shape[:2], *size, *out, *kernel, *stride, *padding, DTYPE_CODES[like.dtype])


def max_pool2d_fwd(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool, indexed: bool
) -> tuple[Tensor, Tensor]:
    """As fastcnn.ops.max_pool2d.max_pool2d_fwd."""
    y = empty_nhwc(*x.shape[:2], *pool_out_sizes(x.shape[2:], kernel, stride, padding, ceil_mode), like=x)
    return y, max_pool2d_into(y, x, kernel, stride, padding, ceil_mode, indexed)


def max_pool2d_into(
    out: Mutable, x: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool, indexed: bool
) -> Tensor:
    """As fastcnn.ops.max_pool2d.max_pool2d_into."""
    x = to_nhwc(x)
    geometry = _geometry(x, tuple(x.shape[2:]), tuple(out.shape[2:]), kernel, stride, padding)
    shape = out.shape if indexed else (0, 1, 1, 1)
    index = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    native.module().max_pool2d_forward(
        geometry, x.data_ptr(), pixel_stride(x), out.data_ptr(), pixel_stride(out),
        index.data_ptr() if indexed else 0,
    )  # fmt: skip
    return index if indexed else index.flatten()


def max_pool2d_bwd(grad: Tensor, index: Tensor, size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """As fastcnn.ops.max_pool2d.max_pool2d_bwd."""
    grad, index = to_nhwc(grad), index.contiguous(memory_format=torch.channels_last)
    n, c = grad.shape[:2]
    dx = empty_nhwc(n, c, *size, like=grad)
    native.module().max_pool2d_backward(
        _geometry(grad, size, tuple(grad.shape[2:]), kernel, stride, padding),
        grad.data_ptr(), pixel_stride(grad), index.data_ptr(), dx.data_ptr(), c,
    )  # fmt: skip
    return dx
