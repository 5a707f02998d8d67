"""The inference form of average pooling before a 1x1 convolution: the other way round, where channels get fewer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcnn.nn.avg_pool2d import AvgPool2d
from fastcnn.nn.folded import FoldedChain, fold
from fastcnn.nn.fused import Unit, convolutions, has_hooks, is_foldable, op_of
from fastcnn.ops import Conv, activations


class FoldedAverage(nn.Module):
    """act(average of product(x) + shift): what the convolution of averages is, since both are linear.

    Args:
        product: the convolution with its normalisation's scale, without its shift.
        pool: the pooling, of the kind that the kernels have (`AvgPool2d.is_plain`).
        shift: per channel, or None.
        act: the activation's name.

    Shapes: x [N, K, H, W] to [N, C, P, Q], channels_last.
    """

    def __init__(self, product: FoldedChain, pool: AvgPool2d, shift: Tensor | None, act: str) -> None:
        super().__init__()
        self.product, self.pool, self.act = product, pool, activations.code(act)
        self.register_buffer("shift", shift)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The output's [N, C, P, Q] for an input's [N, K, H, W]."""
        return self.pool.output_shape(self.product.output_shape(shape))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The output; with ``out``, a channel slice of an NHWC buffer, it is written there."""
        tail = self.pool(self.product(x)), None, self.shift, self.act, None
        if out is None:
            return torch.ops.fastcnn.affine_act_fwd(*tail)
        torch.ops.fastcnn.affine_act_into(out, *tail)
        return out


def fold_average(layer: nn.Module, units: Sequence[Unit], dtype: torch.dtype | None) -> FoldedAverage | None:
    """A pooling and the first unit after it in this form, or None where they are not of the kind or gain nothing."""
    if type(layer) is not AvgPool2d or not layer.is_plain() or has_hooks(layer):
        return None
    first = units[0]
    if len(first.convs) != 1 or op_of(first.convs[0]) != "pointwise" or not is_foldable([first]):
        return None
    conv = first.convs[0]
    if conv.stride != (1, 1) or conv.out_channels >= conv.in_channels:
        return None
    (weight,), shift = fold(convolutions([first], frozen=True)[0], torch.float64)
    own = dtype or conv.weight.dtype
    if shift is not None and own != torch.float64:
        shift = shift.float()
    return FoldedAverage(FoldedChain([Conv("pointwise", (weight,))], dtype=own), layer, shift, first.act)
