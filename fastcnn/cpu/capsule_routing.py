"""Capsule votes and routing in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, floats, pointer


def _shape(u: Tensor, weight: Tensor, iterations: int, leaky: bool) -> tuple:
    """A CapsuleShape."""
    return *u.shape, weight.shape[1], weight.shape[3], iterations, leaky, DTYPE_CODES[u.dtype]


def capsule_routing_fwd(
    u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool
) -> tuple[Tensor, Tensor]:
    """As fastcnn.ops.capsule_routing.capsule_routing_fwd."""
    u, weight, bias = u.contiguous(), floats(weight), floats(bias)
    shape = (u.shape[0], *weight.shape[1::2])
    v, s = torch.empty(shape, dtype=u.dtype), torch.empty((iterations, *shape), dtype=torch.float32)
    native.module().capsule_forward(
        _shape(u, weight, iterations, leaky), u.data_ptr(), weight.data_ptr(), pointer(bias), v.data_ptr(), s.data_ptr()
    )
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
    grad, u, weight, s = grad.to(u.dtype).contiguous(), u.contiguous(), floats(weight), floats(s)
    du = torch.empty(u.shape if need_du else (0,), dtype=u.dtype)
    dw = torch.empty(weight.shape if need_dw else (0,), dtype=torch.float32)
    dbias = torch.empty(weight.shape[1::2], dtype=torch.float32)
    native.module().capsule_backward(
        _shape(u, weight, s.shape[0], leaky), detach, grad.data_ptr(), u.data_ptr(), weight.data_ptr(), s.data_ptr(),
        du.data_ptr() if need_du else 0, dw.data_ptr() if need_dw else 0, dbias.data_ptr(),
    )  # fmt: skip
    return du, dw, dbias
