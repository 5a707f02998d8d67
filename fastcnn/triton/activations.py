"""The activations on registers; the codes are those of fastcnn.ops.activations."""

from __future__ import annotations

import triton
import triton.language as tl

from fastcnn.ops import activations

RELU = tl.constexpr(activations.RELU)
RELU6 = tl.constexpr(activations.RELU6)
SILU = tl.constexpr(activations.SILU)
HARDSWISH = tl.constexpr(activations.HARDSWISH)
AFTER_RESIDUAL = tl.constexpr(activations.AFTER_RESIDUAL)
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z), z float32; NaN stays NaN as in torch. A code with AFTER_RESIDUAL is the identity."""
    if ACT == RELU:
        z = tl.maximum(z, 0.0, propagate_nan=NAN)
    elif ACT == RELU6:
        z = tl.minimum(tl.maximum(z, 0.0, propagate_nan=NAN), 6.0, propagate_nan=NAN)
    elif ACT == SILU:
        z = z / (1.0 + tl.exp(-z))
    elif ACT == HARDSWISH:
        z = z * (tl.minimum(tl.maximum(z + 3.0, 0.0, propagate_nan=NAN), 6.0, propagate_nan=NAN) / 6.0)
    return z


@triton.jit
def activate_after_residual(z, ACT: tl.constexpr):
    """The activation of a sum with a residual, which activate left out for want of the residual."""
    if ACT >= AFTER_RESIDUAL:
        z = activate(z, ACT - AFTER_RESIDUAL)
    return z


@triton.jit
def mask_gradient(g, z, ACT: tl.constexpr):
    """g * act'(z), both float32; at the kinks what torch's backward takes."""
    if ACT == RELU:
        g = tl.where(z > 0.0, g, 0.0)
    elif ACT == RELU6:
        g = tl.where((z > 0.0) & (z < 6.0), g, 0.0)
    elif ACT == SILU:
        s = 1.0 / (1.0 + tl.exp(-z))
        g = g * s * (1.0 + z * (1.0 - s))
    elif ACT == HARDSWISH:
        g = tl.where(z < -3.0, 0.0, tl.where(z <= 3.0, g * (z / 3.0 + 0.5), g))
    return g
