"""1x1 convolutions of one input as one product: x is read once, and its gradient is one product's instead of a sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcnn.ops import activations
from fastcnn.ops.affine_act import copy_into
from fastcnn.ops.channel_join import channel_slices
from fastcnn.ops.layout import autocast, empty_nhwc, to_nhwc
from fastcnn.ops.stages import STORE
from fastcnn.ops.validation import check_shared_pointwise

ops = torch.ops.fastcnn
_ONE, _PLAIN = (1, 1), (None, None, activations.NONE)


class Product(NamedTuple):
    """A raw output [N, C, H, W], a channel slice of all products' buffer, and its batch mean and variance [C], if asked."""

    y: Tensor
    statistics: tuple[Tensor, Tensor] | None


class _SharedPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stats, x, *weights):
        y, mean, var = ops.pointwise_fwd(x, torch.cat(weights), *_PLAIN, *STORE, _ONE, stats)
        ctx.save_for_backward(x, *weights)
        ctx.mark_non_differentiable(mean, var)
        return mean, var, *y.split([len(w) for w in weights], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, _mean, _var, *grads):
        x, *weights = ctx.saved_tensors
        widths = [len(w) for w in weights]
        grad = empty_nhwc(x.shape[0], sum(widths), *x.shape[2:], like=x)
        for part, place in zip(grads, channel_slices(grad, widths), strict=True):
            copy_into(place, to_nhwc(part))
        need_dx, *need_dw = ctx.needs_input_grad[1:]
        dx, dw, _ = ops.pointwise_bwd(
            grad, None, *_PLAIN, None, x, *_PLAIN, None, torch.cat(weights), None, _ONE, need_dx, any(need_dw), False
        )
        dws = dw.to(weights[0].dtype).split(widths) if any(need_dw) else (None,) * len(widths)
        return None, dx if need_dx else None, *dws


def shared_pointwise(x: Tensor, weights: Sequence[Tensor], stats: bool) -> list[Product]:
    """conv2d(x, weight) of every 1x1 weight, differentiable, with the batch statistics of each where ``stats``.

    Shapes: x [N, K, H, W] in any memory format, weights [C, K, 1, 1] each with its own C. Dtypes: as `conv_chain`.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
    """
    check_shared_pointwise(x, weights)
    x = to_nhwc(autocast(x))
    mean, var, *outputs = _SharedPointwise.apply(stats, x, *weights)
    widths = [len(w) for w in weights]
    pairs = zip(mean.split(widths), var.split(widths), strict=True) if stats else [None] * len(widths)
    return [Product(y, pair) for y, pair in zip(outputs, pairs, strict=True)]
