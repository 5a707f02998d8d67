"""The vocabulary that every convolution shares, in plain torch: what happens to operands on load, to results on store.

A convolution is a core with a prologue and an epilogue:

    y = out_act(out_scale * core(in_act(in_scale * x + in_shift), weight) + out_shift) + residual

or, where out_act has activations.AFTER_RESIDUAL added (the residual networks' order),

    y = out_act(out_scale * core(...) + out_shift + residual)

Scale and shift are per channel and optional (None is 1 and 0). With ``stats`` the per-channel mean and biased
variance of y come back too; then there is no out_act and no residual.

The backward of a core takes the gradient ``grad`` at the *activated, normalised* output and turns it, on load, into
the gradient of the raw convolution output y (BN fission, arXiv 1807.01702):

    dz = grad * y_act'(y_scale * y + y_shift)
    dy = coef[0] * dz + coef[1] * (y - coef[2]) + coef[3]          (coef None: dy = dz)

and on store masks the input gradient with the input's own prologue, so that the next backward reads a dz:

    dx = core^T(dy, weight) * x_act'(x_scale * x + x_shift)
    sums = [sum dx, sum dx * (x - x_mean)]                         (per channel of x)

Shapes: x [N, K, H, W], y and grad [N, C, P, Q], coef [4, C], sums [2, K]. Statistics, sums and weight gradients are
float32 (float64 for float64 inputs); what was not asked for comes back empty, with shape [0].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn.ops import activations
from fastcnn.ops.layout import accumulation_dtype


def _channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """scale * x + shift per channel in the accumulation dtype."""
    x = x.to(accumulation_dtype(x))
    if scale is not None:
        x = x * _channel(scale)
    if shift is not None:
        x = x + _channel(shift)
    return x


def gradient_sums(dz: Tensor, y: Tensor, mean: Tensor | None) -> Tensor:
    """[sum dz, sum dz * (y - mean)] per channel, [2, C]."""
    centred = affine(y, None, None if mean is None else -mean)
    return torch.stack([dz.sum((0, 2, 3)), (dz * centred).sum((0, 2, 3))])


def statistics(y: Tensor, stats: bool) -> tuple[Tensor, Tensor]:
    """Per-channel mean and biased variance [C], or two empty tensors."""
    acc = accumulation_dtype(y)
    if not stats:
        return torch.empty(0, dtype=acc, device=y.device), torch.empty(0, dtype=acc, device=y.device)
    var, mean = torch.var_mean(y.to(acc), dim=(0, 2, 3), unbiased=False)
    return mean, var


def prologue(x: Tensor, scale: Tensor | None, shift: Tensor | None, act: int) -> Tensor:
    """act(scale * x + shift) in x's dtype."""
    if scale is None and shift is None and act == activations.NONE:
        return x
    return activations.apply(affine(x, scale, shift), act).to(x.dtype)


def epilogue(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, act: int, residual: Tensor | None, stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """act(scale * y + shift) + residual in y's dtype and NHWC, with its mean and variance."""
    if not (scale is None and shift is None and act == activations.NONE and residual is None):
        dtype, after = y.dtype, act & activations.AFTER_RESIDUAL
        y = affine(y, scale, shift)
        if not after:
            y = activations.apply(y, act)
        if residual is not None:
            y = y + residual
        y = (activations.apply(y, act - after) if after else y).to(dtype)
    return y.contiguous(memory_format=torch.channels_last), *statistics(y, stats)


def gradient_prologue(
    grad: Tensor, y: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: int, coef: Tensor | None
) -> Tensor:
    """dy, the gradient of the raw convolution output, in the accumulation dtype unless it is grad itself."""
    if y is None:
        return grad
    dy = grad.to(accumulation_dtype(y)) * activations.derivative(affine(y, scale, shift), act)
    if coef is not None:
        dy = affine(dy, coef[0], None) + affine(affine(y, None, -coef[2]), coef[1], coef[3])
    return dy
