"""A convolution with dropout of its output: the mask in a pass of its own."""

from __future__ import annotations

from torch import Tensor

from fastcnn.ops.dropout import ELEMENT
from fastcnn.ops.registry import Mutable
from fastcnn.ops.stages import STORE
from fastcnn.triton.affine_act import affine_act_into
from fastcnn.triton.affine_act_bwd import channel_statistics
from fastcnn.triton.conv2d import conv2d_fwd
from fastcnn.triton.dropout import dropout_inplace
from fastcnn.triton.launch import empty

Pair = tuple[int, int]


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
    """mask * scale * a convolution with a prologue, written to ``out``. Returns mean, var of what is stored."""
    y, *_ = conv2d_fwd(x, weight, in_scale, in_shift, in_act, *STORE, stride, padding, dilation, 1, False)
    dropout_inplace(y, p, scale, ELEMENT, seed)
    affine_act_into(out, y, *STORE)
    return channel_statistics(out) if stats else (empty(x), empty(x))
