"""A convolution whose output meets dropout as it is stored: the end of a dense layer."""

from __future__ import annotations

from torch import Tensor

from fastcnn.ops import activations
from fastcnn.ops.affine_act import channel_statistics
from fastcnn.ops.conv2d import conv2d_fwd
from fastcnn.ops.dropout import ELEMENT, dropout_fwd
from fastcnn.ops.fakes import statistics_fake
from fastcnn.ops.registry import Mutable, Pair, register


def _into_fake(out, x, *rest):
    return statistics_fake(out.shape[1], x, rest[-1])


@register(_into_fake)
def conv2d_dropout_into(
    out: Mutable,
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    p: float,
    scale: float,
    seed: Tensor,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    """mask * scale * a convolution with a prologue, written to ``out``, a channel slice of an NHWC buffer.

    The mask is dropout's (`fastcnn.ops.dropout`) of the output's elements, as they lie in a dense NHWC tensor. Returns mean,
    var of what is stored.
    """
    where, store = (stride, padding, dilation, 1), (None, None, activations.NONE, None)
    y, *_ = conv2d_fwd(x, weight, in_scale, in_shift, in_act, *store, *where, False)
    out.copy_(dropout_fwd(y, None, activations.NONE, None, p, scale, ELEMENT, seed))
    if not stats:
        return statistics_fake(out.shape[1], x, False)
    return channel_statistics(out)
