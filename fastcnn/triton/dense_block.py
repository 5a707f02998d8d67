"""The dense block's buffer."""

from __future__ import annotations

from torch import Tensor

from fastcnn.ops import activations
from fastcnn.ops.layout import empty_nhwc
from fastcnn.triton.affine_act import affine_act_into


def widened(x: Tensor, channels: int) -> Tensor:
    """An NHWC buffer of ``channels`` channels whose first are x; the others are uninitialised."""
    buffer = empty_nhwc(x.shape[0], channels, *x.shape[2:], like=x)
    affine_act_into(buffer[:, : x.shape[1]], x, None, None, activations.NONE, None)
    return buffer
