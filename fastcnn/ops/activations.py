"""The activations that a prologue or an epilogue can apply, and their derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NONE, RELU, RELU6, SILU, HARDSWISH = range(5)

# Added to an epilogue's activation: act(scale * y + shift + residual) in place of act(scale * y + shift) + residual.
AFTER_RESIDUAL = 8

# Whose derivative is known from their value: an activation after a residual needs no other tensor in backward.
KNOWN_FROM_OUTPUT = (NONE, RELU, RELU6)

# The order is the wire format: csrc/ops/activation.h and fastcnn/triton/activations.py use the same codes.
NAMES = ("none", "relu", "relu6", "silu", "hardswish")


def code(name: str | None) -> int:
    """The integer code of an activation's name (None means "none").

    Raises:
        ValueError: an unknown name.
    """
    if name is None:
        return NONE
    try:
        return NAMES.index(name)
    except ValueError:
        raise ValueError(f"activation: got {name!r}, expected one of {', '.join(NAMES)}") from None


def apply(z: Tensor, act: int) -> Tensor:
    """act(z), elementwise, in z's dtype."""
    if act == NONE:
        return z
    if act == RELU:
        return F.relu(z)
    if act == RELU6:
        return F.relu6(z)
    if act == SILU:
        return F.silu(z)
    return F.hardswish(z)


def derivative(z: Tensor, act: int) -> Tensor:
    """act'(z), elementwise, in z's dtype; at the kinks the value torch's backward takes."""
    if act == NONE:
        return torch.ones_like(z)
    if act == RELU:
        return (z > 0).to(z.dtype)
    if act == RELU6:
        return ((z > 0) & (z < 6)).to(z.dtype)
    if act == SILU:
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    return torch.where(z < -3, 0.0, torch.where(z <= 3, z / 3 + 0.5, 1.0)).to(z.dtype)
