"""Capsule votes and routing on CUDA: csrc/cuda/capsule_forward.cu and capsule_backward.cu."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastcnn.cuda.launch import DTYPES, Operands, address, floats, module, properties, stream


def _shape(u: Tensor, weight: Tensor, iterations: int, leaky: bool) -> tuple:
    """A CapsuleShape."""
    return *u.shape, weight.shape[1], weight.shape[3], iterations, leaky, DTYPES[u.dtype]


@lru_cache(maxsize=1024)
def _forward_plan(device: int, shape: tuple):
    return module().plan_capsule_fwd(shape, properties(device))


@lru_cache(maxsize=1024)
def _backward_plan(device: int, shape: tuple, detach: bool):
    return module().plan_capsule_bwd(shape, detach, properties(device))


def capsule_routing_fwd(
    u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool
) -> tuple[Tensor, Tensor]:
    """As fastcnn.ops.capsule_routing.capsule_routing_fwd."""
    shape = _shape(u, weight, iterations, leaky)
    plan = _forward_plan(u.device.index, shape)
    outputs = (u.shape[0], *weight.shape[1::2])
    v, s = torch.empty(outputs, dtype=u.dtype, device=u.device), floats((iterations, *outputs), u)
    workspace = floats(plan.workspace, u)
    operands = Operands()
    module().capsule_fwd(
        u.device.index, shape, plan, operands.dense(u, u.dtype), operands.floats(weight), operands.floats(bias),
        address(v), address(s), address(workspace), stream(u.device),
    )  # fmt: skip
    return v, s


def capsule_routing_bwd(
    grad: Tensor,
    u: Tensor,
    weight: Tensor,
    s: Tensor,
    leaky: bool,
    detach: bool,
    need_du: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As fastcnn.ops.capsule_routing.capsule_routing_bwd."""
    shape = _shape(u, weight, s.shape[0], leaky)
    plan = _backward_plan(u.device.index, shape, detach)
    du = torch.empty(u.shape if need_du else (0,), dtype=u.dtype, device=u.device)
    dw, dbias = floats(weight.shape if need_dw else 0, u), floats(weight.shape[1::2], u)
    workspace = floats(plan.workspace, u)
    operands = Operands()
    module().capsule_bwd(
        u.device.index, shape, detach, plan, operands.dense(grad, u.dtype), operands.dense(u, u.dtype),
        operands.floats(weight), operands.floats(s), address(du), address(dw), address(dbias), address(workspace),
        stream(u.device),
    )  # fmt: skip
    return du, dw, dbias


def plan_of(primitive: str, args: tuple):
    """The plan of a call.

    Raises:
        ValueError: the shape is out of the kernels' range.
    """
    if primitive == "capsule_routing_fwd":
        u, weight, _, iterations, leaky = args
        return _forward_plan(u.device.index, _shape(u, weight, iterations, leaky))
    _, u, weight, s, leaky, detach, *_ = args
    return _backward_plan(u.device.index, _shape(u, weight, s.shape[0], leaky), detach)
