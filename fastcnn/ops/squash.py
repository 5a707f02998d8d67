"""squash, the capsules' nonlinearity: v = |s|^2 / (1 + |s|^2) * s / |s|, stable for any norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcnn.ops.layout import accumulation_dtype
from fastcnn.ops.registry import register
from fastcnn.ops.validation import DTYPES, shape_of


def _norm(s: Tensor) -> Tensor:
    """|s| over the last dimension, with squares that neither overflow nor vanish, and 1 where it is 0."""
    largest = s.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    square = (s / unit).square().sum(-1, keepdim=True)
    return torch.where(square > 0, square, 1.0).sqrt() * unit


def squash_values(s: Tensor) -> Tensor:
    """squash over the last dimension by its definition; 0, with a gradient of 0, at 0."""
    norm = _norm(s)
    m = torch.minimum(norm, 1 / norm)  # n / (1 + n^2) is the same for n and 1 / n
    return s * (m / (1 + m * m))


def _fake(s):
    return torch.empty_like(s, memory_format=torch.contiguous_format)


@register(_fake)
def squash_fwd(s: Tensor) -> Tensor:
    """squash of rows [..., D], in s's dtype."""
    return squash_values(s.to(accumulation_dtype(s))).to(s.dtype)


def squash_gradient(g: Tensor, s: Tensor) -> Tensor:
    """ds = f g + n f' (s . g) s / n^2 with n = |s|, f = n / (1 + n^2), n f' = f (1 - n^2) / (1 + n^2); 0 at 0."""
    norm = _norm(s)
    m, direction = torch.minimum(norm, 1 / norm), s / norm
    f = m / (1 + m * m)
    along = (direction * g).sum(-1, keepdim=True) * direction
    slope = f * (1 - m * m) / (1 + m * m) * torch.where(norm > 1, -1.0, 1.0)
    f = torch.where((s != 0).any(-1, keepdim=True), f, 0.0)
    return f * g + slope * along


@register(lambda grad, s: _fake(s))
def squash_bwd(grad: Tensor, s: Tensor) -> Tensor:
    """The gradient of squash_fwd, in s's dtype."""
    acc = accumulation_dtype(s)
    return squash_gradient(grad.to(acc), s.to(acc)).to(s.dtype).contiguous()


class _Squash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s):
        ctx.save_for_backward(s)
        return torch.ops.fastcnn.squash_fwd(s)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (s,) = ctx.saved_tensors
        return torch.ops.fastcnn.squash_bwd(grad.contiguous(), s)


def squash(s: Tensor, dim: int = -1) -> Tensor:
    """Shortens vectors to a length below 1 and keeps their direction: |s|^2 / (1 + |s|^2) * s / |s|, 0 at 0.

    Shapes: any with at least one dimension; the vectors lie along ``dim``. Dtypes: float32, bfloat16, float16, float64.
    Source: Sabour, Frosst & Hinton 2017 (arXiv 1710.09829), equation 1.

    Raises:
        TypeError, ValueError: no floating tensor, no dimension, or a ``dim`` that it has not.
    """
    if not isinstance(s, Tensor) or s.dtype not in DTYPES:
        kind = s.dtype if isinstance(s, Tensor) else type(s).__name__
        raise TypeError(f"s: got {kind}, expected a tensor of {', '.join(map(str, DTYPES))}")
    if not -s.dim() <= dim < s.dim():
        raise ValueError(f"dim: got {dim} for s of shape {shape_of(s)}, expected one of its dimensions")
    return _Squash.apply(s.transpose(dim, -1).contiguous()).transpose(dim, -1)
