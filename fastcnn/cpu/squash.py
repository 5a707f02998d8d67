"""squash in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, pointer


def _run(s: Tensor, grad: Tensor | None) -> Tensor:
    out, dim = torch.empty_like(s, memory_format=torch.contiguous_format), s.shape[-1]
    rows = s.numel() // max(dim, 1)
    native.module().squash(rows, dim, DTYPE_CODES[s.dtype], s.data_ptr(), pointer(grad), out.data_ptr())
    return out


def squash_fwd(s: Tensor) -> Tensor:
    """As fastcnn.ops.squash.squash_fwd."""
    return _run(s.contiguous(), None)


def squash_bwd(grad: Tensor, s: Tensor) -> Tensor:
    """As fastcnn.ops.squash.squash_bwd."""
    return _run(s.contiguous(), grad.to(s.dtype).contiguous())
