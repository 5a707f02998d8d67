"""Local response normalisation in C++."""

from __future__ import annotations

from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, pointer
from fastcnn.cpu.memory import empty_nhwc
from fastcnn.ops.layout import pixel_stride, to_nhwc
from fastcnn.ops.local_response_norm import reach


def _run(x: Tensor, grad: Tensor | None, size: int, alpha: float, beta: float, k: float) -> Tensor:
    x, out = to_nhwc(x), empty_nhwc(*x.shape, like=x)
    n, c, h, w = x.shape
    native.module().local_response_norm(
        (n * h * w, c, DTYPE_CODES[x.dtype]), (*reach(size, c), alpha / size, beta, k), x.data_ptr(), pixel_stride(x),
        pointer(grad), 0 if grad is None else pixel_stride(grad), out.data_ptr(), c,
    )  # fmt: skip
    return out


def local_response_norm_fwd(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """As fastcnn.ops.local_response_norm.local_response_norm_fwd."""
    return _run(x, None, size, alpha, beta, k)


def local_response_norm_bwd(grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """As fastcnn.ops.local_response_norm.local_response_norm_bwd."""
    return _run(x, to_nhwc(grad.to(x.dtype)), size, alpha, beta, k)
