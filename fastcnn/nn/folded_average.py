"""The inference form of average pooling before a 1x1 convolution: the other way round, where channels get fewer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcnn.nn.avg_pool2d import AvgPool2d
from fastcnn.nn.folded import FoldedChain, fold
from fastcnn.nn.fused import Unit, convolutions, has_hooks, is_foldable, op_of
from fastcnn.ops import Affine, Conv, activations


class FoldedAverage(nn.Module):
    """act(average of product(x) + shift): what the convolution of averages is, since both are linear.

    An average passes a constant through, so the shift is the product's where padding does not count. Where it does, what
    is pooled is without it: half precision then rounds the raw product.

    Args:
        product: the convolution with its normalisation's scale, and its shift if that is not given here.
        pool: the pooling, which leaves as many pixels (`AvgPool2d.keeps_size`).
        shift: per channel, or None.
        act: the activation's name.

    Shapes: x [N, K, H, W] to [N, C, P, Q], channels_last. Raises what `FoldedChain` raises.
    """

    def __init__(self, product: FoldedChain, pool: AvgPool2d, shift: Tensor | None, act: str) -> None:
        super().__init__()
        self.product, self.pool, self.act = product, pool, activations.code(act)
        self.register_buffer("shift", shift)

    def extra_repr(self) -> str:
        return f"act={activations.NAMES[self.act]}"

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The output's [N, C, P, Q] for an input's [N, K, H, W]."""
        return self.pool.output_shape(self.product.output_shape(shape))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The output; with ``out``, a channel slice of an NHWC buffer, it is written there."""
        pooled = self.pool(self.product(x))
        if out is None and self.shift is None and self.act == activations.NONE:
            return pooled
        tail = pooled, None, self.shift, self.act, None
        if out is None:
            return torch.ops.fastcnn.affine_act_fwd(*tail)
        torch.ops.fastcnn.affine_act_into(out, *tail)
        return out


def fold_average(
    layer: list[Unit] | nn.Module, after: list[Unit] | nn.Module, dtype: torch.dtype | None
) -> FoldedAverage | None:
    """A pooling and the first unit after it in this form, or None where they are not of the kind or gain nothing."""
    if type(layer) is not AvgPool2d or not layer.keeps_size() or has_hooks(layer) or isinstance(after, nn.Module):
        return None
    first = after[0]
    if len(first.convs) != 1 or op_of(first.convs[0]) != "pointwise" or not is_foldable([first]):
        return None
    conv = first.convs[0]
    if conv.stride != (1, 1) or conv.out_channels >= conv.in_channels:
        return None
    (weight,), shift = fold(convolutions([first], frozen=True)[0], torch.float64)
    own, norm = dtype or conv.weight.dtype, None
    if not layer.count_include_pad:
        norm, shift = Affine(None, shift), None
    elif shift is not None and own != torch.float64:
        shift = shift.float()
    return FoldedAverage(FoldedChain([Conv("pointwise", (weight,), norm=norm)], dtype=own), layer, shift, first.act)
