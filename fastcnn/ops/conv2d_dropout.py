"""A convolution whose output meets dropout as it is stored: the end of a dense layer."""

from __future__ import annotations

from torch import Tensor

from fastcnn.ops.activations import NONE
from fastcnn.ops.affine_act import channel_statistics
from fastcnn.ops.conv2d import conv2d_fwd
from fastcnn.ops.dropout import ELEMENT, dropout_fwd
from fastcnn.ops.fakes import convolution_into_fake
from fastcnn.ops.registry import Mutable, Pair, register
from fastcnn.ops.stages import STORE


@register(convolution_into_fake)
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

    The mask is dropout's (`fastcnn.ops.dropout`) with probability p of the output's elements, as they lie in a dense NHWC
    tensor. Shapes: x [N, K, H, W], weight [C, K, R, S], out [N, C, P, Q], seed [2] int64. Returns mean, var [C] of what is
    stored, in float32 (float64 for float64), empty without stats.
    """
    y, *none = conv2d_fwd(x, weight, in_scale, in_shift, in_act, *STORE, stride, padding, dilation, 1, False)
    out.copy_(dropout_fwd(y, None, NONE, None, p, scale, ELEMENT, seed))
    return channel_statistics(out) if stats else tuple(none)
