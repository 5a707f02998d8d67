"""Scale-shift-activation-residual: where a deferred normalisation is finally materialised, and its backward.

The passes over memory that no convolution can take along: at the ends of a chain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn.ops import activations
from fastcnn.ops.layout import accumulation_dtype
from fastcnn.ops.prologue_epilogue import epilogue, gradient_prologue, gradient_sums, statistics
from fastcnn.ops.registry import Mutable, register


def _forward_fake(y, scale, shift, act, residual):
    return torch.empty_like(y, memory_format=torch.channels_last)


def _sums_fake(grad, y, scale, shift, act, mean):
    return torch.empty((2, y.shape[1]), dtype=accumulation_dtype(y), device=y.device)


def _dgrad_fake(grad, *_):
    return torch.empty_like(grad, memory_format=torch.channels_last)


def _residual_fake(grad, out, act, y, mean, need_sums):
    sums = torch.empty((2, grad.shape[1]) if need_sums else (0,), dtype=accumulation_dtype(grad), device=grad.device)
    return torch.empty_like(grad, memory_format=torch.channels_last), sums


def _statistics_fake(x):
    mean = torch.empty(x.shape[1], dtype=accumulation_dtype(x), device=x.device)
    return mean, torch.empty_like(mean)


@register(_forward_fake)
def affine_act_fwd(y: Tensor, scale: Tensor | None, shift: Tensor | None, act: int, residual: Tensor | None) -> Tensor:
    """act(scale * y + shift) + residual, in y's dtype, NHWC; act may be AFTER_RESIDUAL."""
    return epilogue(y, scale, shift, act, residual, False)[0].clone(memory_format=torch.channels_last)


def _into_fake(out, y, scale, shift, act, residual):
    return None


@register(_into_fake)
def affine_act_into(
    out: Mutable, y: Tensor, scale: Tensor | None, shift: Tensor | None, act: int, residual: Tensor | None
) -> None:
    """affine_act_fwd with its output written to ``out``, which may be a channel slice of an NHWC buffer."""
    out.copy_(affine_act_fwd(y, scale, shift, act, residual))


def copy_into(out: Tensor, y: Tensor) -> None:
    """y written to ``out``, a channel slice of an NHWC buffer, by the chosen backend."""
    torch.ops.fastcnn.affine_act_into(out, y, None, None, activations.NONE, None)


@register(_sums_fake)
def affine_act_sums(
    grad: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None, act: int, mean: Tensor | None
) -> Tensor:
    """[sum dz, sum dz * (y - mean)] per channel, [2, C], where dz = grad * act'(scale * y + shift)."""
    dz = gradient_prologue(grad.to(accumulation_dtype(y)), y, scale, shift, act, None)
    return gradient_sums(dz, y, mean)


@register(_dgrad_fake)
def affine_act_dgrad(
    grad: Tensor,
    y: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: int,
    coef: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """The gradient prologue's dy (prologue_epilogue), written to memory, plus residual; in grad's dtype, NHWC."""
    dy = gradient_prologue(grad.to(accumulation_dtype(grad)), y, scale, shift, act, coef)
    dy = dy if residual is None else dy + residual
    return dy.to(grad.dtype).clone(memory_format=torch.channels_last)


@register(_residual_fake)
def residual_act_bwd(
    grad: Tensor, out: Tensor, act: int, y: Tensor, mean: Tensor | None, need_sums: bool
) -> tuple[Tensor, Tensor]:
    """Backward of an activation after a residual: dz = grad * act'(z), seen from out = act(z), and its two sums.

    act is one of activations.KNOWN_FROM_OUTPUT; sums = [sum dz, sum dz * (y - mean)] per channel, [2, C], of the raw
    output y of the convolution before it. dz is both the residual's gradient and that of the normalised y.
    """
    acc = accumulation_dtype(grad)
    dz = (grad.to(acc) * activations.derivative(out, act)).to(grad.dtype).contiguous(memory_format=torch.channels_last)
    empty = torch.empty(0, dtype=acc, device=grad.device)
    return dz.clone(memory_format=torch.channels_last), gradient_sums(dz.to(acc), y, mean) if need_sums else empty


@register(_statistics_fake)
def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of each channel."""
    return statistics(x, True)
