"""Prologue and epilogue on register tiles [rows, channels]; fastcnn/ops/prologue_epilogue.py has the formulas.

A pointer that is None costs nothing: Triton specialises on it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastcnn.triton.activations import activate, activate_after_residual, mask_gradient


@triton.jit
def per_channel(ptr, channels, mask):
    """A parameter of each channel [1, channels] in float32, 0 where masked."""
    return tl.load(ptr + channels, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def affine(x, scale, shift):
    """scale * x + shift in float32; scale and shift are rows [1, channels] or None."""
    x = x.to(tl.float32)
    if scale is not None:
        x = x * scale
    if shift is not None:
        x = x + shift
    return x


@triton.jit
def load_affine(x, scale, shift, channels, mask):
    """affine with scale and shift given as pointers, or None."""
    if scale is not None:
        scale = per_channel(scale, channels, mask)
    if shift is not None:
        shift = per_channel(shift, channels, mask)
    return affine(x, scale, shift)


@triton.jit
def load_activated(x, offsets, mask, scale, shift, channels, channel_mask, ACT: tl.constexpr, PADDED: tl.constexpr):
    """act(scale * x + shift) of what lies at the offsets, in x's dtype; scale and shift are pointers, or None.

    What is masked is 0 if PADDED: the padding is of the activated input. Otherwise it is anything finite.
    """
    a = tl.load(x + offsets, mask=mask, other=0.0)
    if scale is not None or shift is not None or ACT != 0:
        a = activate(load_affine(a, scale, shift, channels, channel_mask), ACT).to(x.dtype.element_ty)
        if PADDED and (scale is not None or shift is not None):
            a = tl.where(mask, a, 0.0)
    return a


@triton.jit
def epilogue(acc, scale, shift, ACT: tl.constexpr, residual, offsets, mask):
    """act(scale * acc + shift) + residual[offsets] in float32; scale and shift are rows or None."""
    y = activate(affine(acc, scale, shift), ACT)
    if residual is not None:
        y = y + tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    return activate_after_residual(y, ACT)


@triton.jit
def load_coefficients(coef, channels, mask, C):
    """The four rows of coef [4, C]."""
    return (
        per_channel(coef, channels, mask),
        per_channel(coef + C, channels, mask),
        per_channel(coef + 2 * C, channels, mask),
        per_channel(coef + 3 * C, channels, mask),
    )


@triton.jit
def load_gradient(grad, grad_offsets, y, y_offsets, scale, shift, ACT: tl.constexpr, coef, mask):
    """dy of what lies at the offsets, float32, 0 where masked; scale, shift and coef are rows or None, y may be None.

    dz = grad * act'(scale * y + shift);  dy = coef[0] * dz + coef[1] * (y - coef[2]) + coef[3]
    """
    dy = tl.load(grad + grad_offsets, mask=mask, other=0.0).to(tl.float32)
    if y is not None:
        raw = tl.load(y + y_offsets, mask=mask, other=0.0).to(tl.float32)
        dy = mask_gradient(dy, affine(raw, scale, shift), ACT)
        if coef is not None:
            dy = coef[0] * dy + coef[1] * (raw - coef[2]) + coef[3]
            dy = tl.where(mask, dy, 0.0)
    return dy


@triton.jit
def load_channel_gradient(
    grad, grad_offsets, y, y_offsets, scale, shift, ACT: tl.constexpr, coef, mask, channels, channel_mask, C
):
    """load_gradient with scale, shift and coef [4, C] given as pointers, or None."""
    if scale is not None:
        scale = per_channel(scale, channels, channel_mask)
    if shift is not None:
        shift = per_channel(shift, channels, channel_mask)
    if coef is not None:
        coef = load_coefficients(coef, channels, channel_mask, C)
    return load_gradient(grad, grad_offsets, y, y_offsets, scale, shift, ACT, coef, mask)
