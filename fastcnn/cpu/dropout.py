"""Inverted dropout in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, floats, pointer
from fastcnn.cpu.memory import empty_like
from fastcnn.ops.dropout import mask_of, threshold
from fastcnn.ops.registry import Mutable


def _mask(x: Tensor, bias: Tensor | None, p: float, scale: float, unit: int, seed: Tensor) -> tuple:
    """A DropoutMask."""
    return *mask_of(x, bias, unit), threshold(p), scale, seed.data_ptr()


def dropout_fwd(
    x: Tensor,
    bias: Tensor | None,
    act: int,
    residual: Tensor | None,
    p: float,
    scale: float,
    unit: int,
    seed: Tensor,
) -> Tensor:
    """As fastcnn.ops.dropout.dropout_fwd."""
    out, bias = empty_like(x), floats(bias)
    native.module().dropout_forward(
        _mask(x, bias, p, scale, unit, seed), DTYPE_CODES[x.dtype], x.data_ptr(), pointer(bias), act,
        pointer(residual), out.data_ptr(),
    )  # fmt: skip
    return out


def dropout_bwd(
    grad: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    act: int,
    p: float,
    scale: float,
    unit: int,
    seed: Tensor,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """As fastcnn.ops.dropout.dropout_bwd."""
    dx, bias = empty_like(grad), floats(bias)
    dbias = torch.empty(bias.shape if need_bias else (0,), dtype=torch.float32)
    native.module().dropout_backward(
        _mask(grad, bias, p, scale, unit, seed), DTYPE_CODES[grad.dtype], grad.data_ptr(), pointer(z), pointer(bias),
        act, dx.data_ptr(), dbias.data_ptr() if need_bias else 0,
    )  # fmt: skip
    return dx, dbias


def dropout_inplace(x: Mutable, p: float, scale: float, unit: int, seed: Tensor) -> None:
    """As fastcnn.ops.dropout.dropout_inplace."""
    native.module().dropout_forward(
        _mask(x, None, p, scale, unit, seed), DTYPE_CODES[x.dtype], x.data_ptr(), 0, 0, 0, x.data_ptr()
    )
