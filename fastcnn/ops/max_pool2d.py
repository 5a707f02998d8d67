"""Maximum pooling between fused chains. What won a window is kept as one byte: torch keeps eight, and its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcnn.ops.layout import empty_nhwc, pool_out_sizes, to_nhwc
from fastcnn.ops.registry import Mutable, Pair, register
from fastcnn.ops.validation import check_out

MOST_POSITIONS = 256  # of a window, that a byte tells apart


def _forward_fake(x, kernel, stride, padding, ceil_mode, indexed):
    n, c, *size = x.shape
    y = empty_nhwc(n, c, *pool_out_sizes(size, kernel, stride, padding, ceil_mode), like=x)
    return y, torch.empty_like(y, dtype=torch.uint8) if indexed else x.new_empty(0, dtype=torch.uint8)


def _backward_fake(grad, index, size, kernel, stride, padding):
    return empty_nhwc(*grad.shape[:2], *size, like=grad)


def _first_positions(out: int, stride: int, padding: int, device: torch.device) -> Tensor:
    return torch.arange(out, device=device) * stride - padding


@register(_forward_fake)
def max_pool2d_fwd(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool, indexed: bool
) -> tuple[Tensor, Tensor]:
    """The largest value of every window, [N, C, H, W] to [N, C, P, Q]; padding never wins. NaN where there is one.

    With ``indexed`` also which position of its window won: r * S + s in a uint8 tensor like the output.
    """
    window = tuple(kernel), tuple(stride), tuple(padding), 1, ceil_mode
    if not indexed:
        return F.max_pool2d(x, *window).contiguous(memory_format=torch.channels_last), x.new_empty(0, dtype=torch.uint8)
    y, flat = F.max_pool2d(x, *window, return_indices=True)
    h, w = flat // x.shape[3], flat % x.shape[3]
    h = h - _first_positions(y.shape[2], stride[0], padding[0], x.device)[:, None]
    w = w - _first_positions(y.shape[3], stride[1], padding[1], x.device)
    index = (h * kernel[1] + w).to(torch.uint8)
    return tuple(t.contiguous(memory_format=torch.channels_last) for t in (y, index))


def _into_fake(out, x, kernel, stride, padding, ceil_mode, indexed):
    if not indexed:
        return x.new_empty(0, dtype=torch.uint8)
    return torch.empty_like(out, dtype=torch.uint8, memory_format=torch.channels_last)


@register(_into_fake)
def max_pool2d_into(
    out: Mutable, x: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool, indexed: bool
) -> Tensor:
    """max_pool2d_fwd with its output written to ``out``, a channel slice of an NHWC buffer. Returns what won."""
    y, index = max_pool2d_fwd(x, kernel, stride, padding, ceil_mode, indexed)
    out.copy_(y)
    return index


@register(_backward_fake)
def max_pool2d_bwd(grad: Tensor, index: Tensor, size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """The input's gradient [N, C, *size] from the output's and what won."""
    n, c, p, q = grad.shape
    h = index // kernel[1] + _first_positions(p, stride[0], padding[0], grad.device)[:, None]
    w = index % kernel[1] + _first_positions(q, stride[1], padding[1], grad.device)
    flat = (h * size[1] + w).flatten(2)
    dx = torch.zeros((n, c, size[0] * size[1]), dtype=grad.dtype, device=grad.device)
    dx.scatter_add_(2, flat, grad.flatten(2))
    return dx.view(n, c, *size).contiguous(memory_format=torch.channels_last)


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, into, x, *window):
        """into is None or (out,): in a tuple autograd does not take what is written for an argument."""
        if into is None:
            y, index = torch.ops.fastcnn.max_pool2d_fwd(x, *window, True)
        else:
            (y,) = into
            index = torch.ops.fastcnn.max_pool2d_into(y, x, *window, True)
        ctx.size, ctx.window = tuple(x.shape[2:]), window[:3]
        ctx.save_for_backward(index)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx = torch.ops.fastcnn.max_pool2d_bwd(to_nhwc(grad), *ctx.saved_tensors, ctx.size, *ctx.window)
        return None, dx, None, None, None, None


def max_pool2d(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool = False, *, out: Tensor | None = None
) -> Tensor:
    """torch.nn.functional.max_pool2d on fused backends, differentiable; with a gradient on GPUs it is torch's own.

    With ``ceil_mode`` a last window may reach over the image's edge. With ``out``, one of `channel_slices`, our kernels write
    the result there and return that tensor; torch's own is new.

    Shapes: x [N, C, H, W] to [N, C, P, Q], channels_last. Dtypes: any floating one.

    Raises:
        ValueError: a padding of more than half the window, an image without a window, an ``out`` of another shape, layout,
            dtype or device than the result.
    """
    window = kernel, stride, padding, ceil_mode
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(f"padding: got {padding}, expected at most half of the window {kernel}")
    size = pool_out_sizes(x.shape[2:], *window)
    if min(size) < 1:
        raise ValueError(f"x: got shape {list(x.shape)}, expected room for a window {kernel}")
    if out is not None:
        check_out(out, (*x.shape[:2], *size), x.dtype, x.device)
    if not (torch.is_grad_enabled() and x.requires_grad):
        if out is None:
            return torch.ops.fastcnn.max_pool2d_fwd(x, *window, False)[0]
        torch.ops.fastcnn.max_pool2d_into(out, x, *window, False)
        return out
    if x.device.type != "cpu" or kernel[0] * kernel[1] > MOST_POSITIONS:
        return F.max_pool2d(x, kernel, stride, padding, 1, ceil_mode)
    return _MaxPool2d.apply(None if out is None else (out,), x, *window)
