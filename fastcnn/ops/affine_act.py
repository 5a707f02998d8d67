"""Scale-shift-activation-residual: where a deferred normalisation is finally materialised, and its two sums."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn.ops.layout import accumulation_dtype
from fastcnn.ops.prologue_epilogue import epilogue, gradient_prologue, gradient_sums
from fastcnn.ops.registry import register


def _forward_fake(y, scale, shift, act, residual):
    return torch.empty_like(y, memory_format=torch.channels_last)


def _sums_fake(grad, y, scale, shift, act, mean):
    return torch.empty((2, y.shape[1]), dtype=accumulation_dtype(y), device=y.device)


@register(_forward_fake)
def affine_act_fwd(y: Tensor, scale: Tensor | None, shift: Tensor | None, act: int, residual: Tensor | None) -> Tensor:
    """act(scale * y + shift) + residual, in y's dtype, NHWC."""
    return epilogue(y, scale, shift, act, residual, False)[0].clone(memory_format=torch.channels_last)


@register(_sums_fake)
def affine_act_sums(
    grad: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None, act: int, mean: Tensor | None
) -> Tensor:
    """[sum dz, sum dz * (y - mean)] per channel, [2, C], where dz = grad * act'(scale * y + shift)."""
    dz = gradient_prologue(grad.to(accumulation_dtype(y)), y, scale, shift, act, None)
    return gradient_sums(dz, y, mean)
