"""Average pooling between fused chains, with the normalisation and activation before it as its prologue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcnn.ops import activations
from fastcnn.ops.layout import accumulation_dtype, conv_out_sizes, empty_nhwc, to_nhwc
from fastcnn.ops.prologue_epilogue import affine, gradient_sums
from fastcnn.ops.registry import Pair, register


def _forward_fake(x, in_scale, in_shift, in_act, kernel, stride, padding, counts_padding):
    n, c, *size = x.shape
    return empty_nhwc(n, c, *conv_out_sizes(size, kernel, stride, padding), like=x)


def _backward_fake(grad, x, x_scale, x_shift, x_act, x_mean, kernel, stride, padding, counts_padding, need_sums):
    sums = torch.empty((2, x.shape[1]) if need_sums else (0,), dtype=accumulation_dtype(x), device=x.device)
    return empty_nhwc(*x.shape, like=grad), sums


@register(_forward_fake)
def avg_pool2d_fwd(
    x: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    counts_padding: bool,
) -> Tensor:
    """The mean of in_act(in_scale * x + in_shift) over every window, [N, C, H, W] to [N, C, P, Q].

    Padding is zero after the prologue; it is among what the mean divides by, or not.
    """
    z = activations.apply(affine(x, in_scale, in_shift), in_act)
    y = F.avg_pool2d(z, tuple(kernel), tuple(stride), tuple(padding), False, counts_padding)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


@register(_backward_fake)
def avg_pool2d_bwd(
    grad: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_act: int,
    x_mean: Tensor | None,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    counts_padding: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient before the prologue's normalisation, masked by its activation, and its sums (prologue_epilogue)."""
    acc = accumulation_dtype(x)
    dx = torch.ops.aten.avg_pool2d_backward(
        grad.to(acc), x.to(acc), tuple(kernel), tuple(stride), tuple(padding), False, counts_padding, None
    )
    if x_act != activations.NONE:
        dx = dx * activations.derivative(affine(x, x_scale, x_shift), x_act)
    sums = gradient_sums(dx, x, x_mean) if need_sums else torch.empty(0, dtype=acc, device=x.device)
    return dx.to(grad.dtype).contiguous(memory_format=torch.channels_last), sums


class _AvgPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *window):
        ctx.window, ctx.size = window, tuple(x.shape)
        return torch.ops.fastcnn.avg_pool2d_fwd(x, None, None, activations.NONE, *window)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # Without a prologue no value of x is read.
        x = grad.new_empty(1).expand(ctx.size)
        dx, _ = torch.ops.fastcnn.avg_pool2d_bwd(
            to_nhwc(grad), x, None, None, activations.NONE, None, *ctx.window, False
        )
        return dx, *(None,) * len(ctx.window)


def avg_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, counts_padding: bool = True) -> Tensor:
    """torch.nn.functional.avg_pool2d on fused backends, differentiable; on GPUs it is torch's own.

    Shapes: x [N, C, H, W] to [N, C, P, Q], channels_last. Dtypes: any floating one.
    """
    if x.device.type != "cpu":
        return F.avg_pool2d(x, kernel, stride, padding, False, counts_padding)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return torch.ops.fastcnn.avg_pool2d_fwd(
            x, None, None, activations.NONE, kernel, stride, padding, counts_padding
        )
    return _AvgPool2d.apply(x, kernel, stride, padding, counts_padding)
