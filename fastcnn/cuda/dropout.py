"""Inverted dropout on CUDA: csrc/cuda/dropout.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn.cuda.launch import DTYPES, Operands, address, floats, module, properties, stream
from fastcnn.ops.activations import NONE
from fastcnn.ops.dropout import mask_of, threshold
from fastcnn.ops.registry import Mutable


def _mask(x: Tensor, bias: Tensor | None, p: float, scale: float, unit: int, seed: int) -> tuple:
    """A DropoutMask; the seed is a pointer."""
    return *mask_of(x, bias, unit), threshold(p), scale, seed


def _forward(
    x: Tensor,
    bias: Tensor | None,
    act: int,
    residual: Tensor | None,
    p: float,
    scale: float,
    unit: int,
    seed: Tensor,
    out: Tensor,
) -> None:
    operands = Operands()
    mask = _mask(x, bias, p, scale, unit, operands.dense(seed, torch.int64))
    plan = module().plan_dropout(mask, DTYPES[x.dtype], bias is not None, False, properties(x.device.index))
    module().dropout_fwd(
        x.device.index, mask, DTYPES[x.dtype], plan, address(x), operands.floats(bias), act, address(residual),
        address(out), stream(x.device),
    )  # fmt: skip


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
    out = torch.empty_like(x)
    _forward(x, bias, act, residual, p, scale, unit, seed, out)
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
    dx, dbias = torch.empty_like(grad), floats(bias.shape if need_bias else 0, grad)
    operands = Operands()
    mask = _mask(grad, bias, p, scale, unit, operands.dense(seed, torch.int64))
    plan = module().plan_dropout(mask, DTYPES[grad.dtype], bias is not None, need_bias, properties(grad.device.index))
    workspace = floats(plan.workspace, grad)
    module().dropout_bwd(
        grad.device.index, mask, DTYPES[grad.dtype], plan, address(grad), address(z), operands.floats(bias), act,
        address(dx), address(dbias), address(workspace), stream(grad.device),
    )  # fmt: skip
    return dx, dbias


def dropout_inplace(x: Mutable, p: float, scale: float, unit: int, seed: Tensor) -> None:
    """As fastcnn.ops.dropout.dropout_inplace."""
    _forward(x, None, NONE, None, p, scale, unit, seed, x)
