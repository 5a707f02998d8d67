"""Local response normalisation across channels. Backward makes the denominators again: it keeps the input alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcnn.ops.layout import accumulation_dtype, empty_nhwc, to_nhwc
from fastcnn.ops.registry import register
from fastcnn.ops.validation import check_input


def reach(size: int, channels: int) -> tuple[int, int]:
    """Channels before and after its own that a window sees; torch's, of an even size, leans to those before."""
    return min(size // 2, channels - 1), min((size - 1) // 2, channels - 1)


def _window_sums(t: Tensor, before: int, after: int) -> Tensor:
    """The sums of t [N, C, H, W] from ``before`` channels before each to ``after`` after it."""
    padded = F.pad(t, (0, 0, 0, 0, before, after))
    return padded.unfold(1, before + 1 + after, 1).sum(-1)


def _denominators(x: Tensor, size: int, alpha: float, k: float) -> Tensor:
    return k + alpha / size * _window_sums(x.square(), *reach(size, x.shape[1]))


def _fake(x, size, alpha, beta, k):
    return empty_nhwc(*x.shape, like=x)


@register(_fake)
def local_response_norm_fwd(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """x / d^beta, d = k + alpha / size * the sum of x^2 over a window of ``size`` channels, [N, C, H, W]."""
    z = x.to(accumulation_dtype(x))
    y = z * _denominators(z, size, alpha, k).pow(-beta)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


@register(lambda grad, x, *parameters: _fake(grad, *parameters))
def local_response_norm_bwd(grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """dx = grad d^-beta - 2 alpha beta / size * x * the sum of grad x d^(-beta - 1) over all windows that x is in."""
    acc = accumulation_dtype(x)
    g, z = grad.to(acc), x.to(acc)
    d = _denominators(z, size, alpha, k)
    before, after = reach(size, x.shape[1])
    direct = g * d.pow(-beta)
    dx = direct - 2 * alpha * beta / size * z * _window_sums(direct * (z / d), after, before)
    return dx.to(grad.dtype).contiguous(memory_format=torch.channels_last)


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.save_for_backward(x)
        ctx.parameters = parameters
        return torch.ops.fastcnn.local_response_norm_fwd(x, *parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx = torch.ops.fastcnn.local_response_norm_bwd(to_nhwc(grad), *ctx.saved_tensors, *ctx.parameters)
        return dx, *(None,) * len(ctx.parameters)


_LEAST = torch.finfo(torch.float32).tiny  # the kernels compute in float32


def _misfit(size: int, alpha: float, beta: float, k: float) -> tuple[str, object, str] | None:
    """What the kernels do not have, as its name, what came and what was expected; or None."""
    if not isinstance(size, int) or size < 1:
        return "size", size, "an integer of at least 1"
    for name, value, least, expected in (
        ("alpha", alpha, 0.0, "a finite number of at least 0"),
        ("beta", beta, -math.inf, "a finite number"),
        ("k", k, _LEAST, f"a finite number of at least {_LEAST:.3g}"),
    ):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= least):
            return name, value, expected
    return None


def is_fused(x: Tensor, size: int, alpha: float, beta: float, k: float) -> bool:
    """Whether the kernels have this: four dimensions, none empty, and numbers that they can hold."""
    return x.dim() == 4 and x.numel() > 0 and _misfit(size, alpha, beta, k) is None


def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """x / (k + alpha / size * sum of the squares of ``size`` channels around each)^beta, differentiable; arguments as torch's.

    Shapes: x [N, C, H, W] to the same, channels_last. Dtypes: float32, bfloat16, float16, float64, halves summed in float32.
    Source: AlexNet (Krizhevsky et al. 2012, section 3.3), with the alpha of Caffe and torch, which is divided by the size.

    Raises:
        TypeError: x is no floating tensor.
        ValueError: x has not four dimensions or an empty one besides the batch; a size below 1, an alpha below 0, a k below
            float32's normal numbers, or any that is no finite number.
    """
    check_input(x)
    if misfit := _misfit(size, alpha, beta, k):
        name, value, expected = misfit
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    x = to_nhwc(x)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return torch.ops.fastcnn.local_response_norm_fwd(x, size, alpha, beta, k)
    return _LocalResponseNorm.apply(x, size, alpha, beta, k)
