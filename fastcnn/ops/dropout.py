"""Inverted dropout with counter-based random numbers: one pass over memory, no mask in it, forward or backward.

Draw i is word i % 4 of Philox-4x32-10 (Salmon et al. 2011) with the counter (i // 4, offset) and the key ``seed``; what it
decides on, an element, a channel of a sample or a sample, is kept where the draw is at least p * 2^32, and divided by
1 - p. A seed and an offset give the same mask on every backend, whatever the threads. Backward draws it again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcnn.ops import activations
from fastcnn.ops.layout import accumulation_dtype
from fastcnn.ops.philox import draws
from fastcnn.ops.registry import Mutable, register
from fastcnn.ops.validation import DTYPES, shape_of

ELEMENT, CHANNEL, SAMPLE = range(3)  # csrc/ops/dropout.h has the same codes


class Mask(NamedTuple):
    """A tensor's memory as a matrix [rows, channels] of rows_per_sample rows each sample, and what a draw decides on."""

    rows: int
    channels: int
    rows_per_sample: int
    unit: int


def mask_of(x: Tensor, bias: Tensor | None, unit: int) -> Mask:
    """The matrix of a dense x [N, C, ...]: pixels and channels where there is a bias or the memory is NHWC, else planes.

    With a bias x is NHWC, or contiguous with the channels last.
    """
    size = x.numel()
    if unit == ELEMENT and bias is None:
        return Mask(1, size, 1, ELEMENT)
    nhwc = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if bias is not None or (unit == CHANNEL and nhwc):
        channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
        rows = size // max(channels, 1)
        return Mask(rows, channels, rows // max(x.shape[0], 1), unit)
    samples = x.shape[0] * x.shape[1] if unit == CHANNEL else x.shape[0]
    return Mask(samples, size // max(samples, 1), 1, SAMPLE)


def threshold(p: float) -> int:
    """The least draw, of 2^32, that is kept."""
    return min(1 << 32, round(p * (1 << 32)))


def kept(mask: Mask, p: float, seed: Tensor) -> Tensor:
    """Which elements of the matrix stay, [rows, channels] or what broadcasts to it."""
    rows = torch.arange(mask.rows, device=seed.device)[:, None]
    channels = torch.arange(mask.channels, device=seed.device)
    if mask.unit == ELEMENT:
        index = rows * mask.channels + channels
    elif mask.unit == CHANNEL:
        index = rows // mask.rows_per_sample * mask.channels + channels
    else:
        index = rows // mask.rows_per_sample
    return draws(index, seed) >= threshold(p)


def _matrix(t: Tensor, mask: Mask) -> Tensor:
    return t.as_strided((mask.rows, mask.channels), (mask.channels, 1))


def _forward_fake(x, bias, act, residual, p, scale, unit, seed):
    return torch.empty_like(x)


def _backward_fake(grad, z, bias, act, p, scale, unit, seed, need_bias):
    size = _channels(grad) if need_bias else 0
    return torch.empty_like(grad), torch.empty(size, dtype=accumulation_dtype(grad), device=grad.device)


def _channels(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 4 else x.shape[-1]


@register(_forward_fake)
def dropout_fwd(
    x: Tensor,
    bias: Tensor | None,
    act: int,
    residual: Tensor | None,
    p: float,
    scale: float,
    unit: int,
    seed: Tensor,
) -> Tensor:
    """mask * scale * act(x + bias) + residual, in x's dtype and memory; x dense, residual like it, seed [2] int64."""
    mask = mask_of(x, bias, unit)
    z = _matrix(x, mask).to(accumulation_dtype(x))
    z = activations.apply(z if bias is None else z + bias, act)
    z = torch.where(kept(mask, p, seed), z * scale, 0.0)
    z = z if residual is None else z + _matrix(residual, mask)
    out = torch.empty_like(x)
    _matrix(out, mask).copy_(z)
    return out


@register(_backward_fake)
def dropout_bwd(
    grad: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    act: int,
    p: float,
    scale: float,
    unit: int,
    seed: Tensor,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """dx = mask * scale * grad * act'(z + bias), like grad, and its sum over all but the channels [C].

    A bias that was added in forward is given here too, if only for the matrix; z like grad, None without an activation.
    """
    mask = mask_of(grad, bias, unit)
    g = _matrix(grad, mask).to(accumulation_dtype(grad))
    g = torch.where(kept(mask, p, seed), g * scale, 0.0)
    if act != activations.NONE:
        g = g * activations.derivative(_matrix(z, mask).to(g.dtype) + (0.0 if bias is None else bias), act)
    dx = torch.empty_like(grad)
    _matrix(dx, mask).copy_(g)
    return dx, g.sum(0) if need_bias else g.new_empty(0)


@register(lambda *_: None)
def dropout_inplace(x: Mutable, p: float, scale: float, unit: int, seed: Tensor) -> None:
    """x = mask * scale * x; x dense."""
    x.copy_(dropout_fwd(x, None, activations.NONE, None, p, scale, unit, seed))


def _laid_out(t: Tensor, stride: tuple[int, ...]) -> Tensor:
    """t, or a copy of it with these strides."""
    return t if t.stride() == stride else torch.empty_strided(t.shape, stride, dtype=t.dtype, device=t.device).copy_(t)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, seed, act, *how):
        out = torch.ops.fastcnn.dropout_fwd(x, bias, act, residual, *how, seed)
        # What ReLU cut is known from the output, which the next layer saves anyway.
        known = act == activations.RELU and residual is None
        z = None if act == activations.NONE else out if known else x
        ctx.act, ctx.how, ctx.known, ctx.stride = act, how, known, x.stride()
        ctx.save_for_backward(seed, z, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        seed, z, bias = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            own, need_bias = _laid_out(grad, ctx.stride), ctx.needs_input_grad[1]
            shift = torch.zeros_like(bias) if ctx.known and bias is not None else bias
            dx, dbias = torch.ops.fastcnn.dropout_bwd(own, z, shift, ctx.act, *ctx.how, seed, need_bias)
            dbias = dbias.to(bias.dtype) if need_bias else None
        return dx, dbias, grad if ctx.needs_input_grad[2] else None, *(None,) * (2 + len(ctx.how))


class _InplaceDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, *how):
        torch.ops.fastcnn.dropout_inplace(x, *how, seed)
        ctx.mark_dirty(x)
        ctx.how, ctx.stride = how, x.stride()
        ctx.save_for_backward(seed)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (seed,) = ctx.saved_tensors
        own = _laid_out(grad, ctx.stride)
        dx, _ = torch.ops.fastcnn.dropout_bwd(own, None, None, activations.NONE, *ctx.how, seed, False)
        return dx, *(None,) * (1 + len(ctx.how))


Seed = int | tuple[int, int]


def distribution(p: float, unit: int, rescale: bool = True) -> tuple[float, float, int]:
    """p, scale and unit as the primitives take them."""
    return p, 1 / (1 - p) if rescale and p < 1 else 1.0, unit


def key_of(x: Tensor, generator: torch.Generator | None = None, seed: Seed | None = None) -> Tensor:
    """Key and offset [2]: the ones given, or the next of torch's generator."""
    if seed is None:
        least = -(1 << 63)
        return torch.randint(least, -least - 1, (2,), dtype=torch.int64, device=x.device, generator=generator)
    key, offset = (seed, 0) if isinstance(seed, int) else seed
    signed = [(int(v) + (1 << 63)) % (1 << 64) - (1 << 63) for v in (key, offset)]
    return torch.tensor(signed, dtype=torch.int64, device=x.device)


def _has_no_gaps(x: Tensor) -> bool:
    """Whether x's elements fill their memory, each place once, in any order of dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _dense(x: Tensor, with_bias: bool, unit: int) -> Tensor:
    """x itself where its memory has no gaps and a layout that the kernels know, else a copy."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and x.numel():
        return x
    if with_bias and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if with_bias or unit != ELEMENT:
        return x.contiguous()
    return x if _has_no_gaps(x) else x.contiguous()


def _check(x: Tensor, p: float, bias: Tensor | None, residual: Tensor | None, unit: int) -> None:
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: got {kind}, expected a tensor of {', '.join(map(str, DTYPES))}")
    if not (isinstance(p, (int, float)) and 0 <= p <= 1):
        raise ValueError(f"p: got {p!r}, expected a probability in [0, 1]")
    least = {ELEMENT: 0, CHANNEL: 2, SAMPLE: 1}[unit]
    if x.dim() < max(least, bias is not None):
        raise ValueError(f"x: got shape {shape_of(x)}, expected at least {max(least, 1)} dimensions")
    if bias is not None and bias.shape != (_channels(x),):
        raise ValueError(f"bias: got shape {shape_of(bias)}, expected [{_channels(x)}], x's channels")
    if residual is not None and (residual.shape != x.shape or residual.device != x.device):
        raise ValueError(
            f"residual: got shape {shape_of(residual)} on {residual.device}, expected x's, {shape_of(x)} on {x.device}"
        )


def _run(
    x: Tensor,
    p: float,
    training: bool,
    unit: int,
    inplace: bool = False,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: Seed | None = None,
    rescale: bool = True,
) -> Tensor:
    _check(x, p, bias, residual, unit)
    code, p = activations.code(act), float(p) if training else 0.0
    plain = bias is None and residual is None and code == activations.NONE
    if plain and (p == 0 or not x.numel()):
        return x
    if inplace and not plain:
        raise ValueError("inplace: got True with a bias, an activation or a residual, expected False")
    how = distribution(p, unit, rescale)
    key = key_of(x, generator, seed) if p else torch.zeros(2, dtype=torch.int64, device=x.device)
    own = _dense(x, bias is not None, unit)
    if inplace and own is x:
        return _InplaceDropout.apply(x, key, *how)
    if residual is not None:
        residual = _laid_out(residual.to(own.dtype), own.stride())
    out = _Dropout.apply(own, bias, residual, key, code, *how)
    return x.copy_(out) if inplace else out


def dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: Seed | None = None,
) -> Tensor:
    """Zeroes elements with probability p and divides the rest by 1 - p: dropout(act(x + bias)) + residual in one pass.

    Shapes: x of any shape; bias [C], where C is x's second dimension if x is [N, C, H, W], else its last; residual like
    x. The result lies in memory as x does (NHWC if x is [N, C, H, W] and has a bias). What is dropped is 0, even a NaN.
    Dtypes: float32, bfloat16, float16, float64. Without ``training``, p is 0: only the bias, the activation and the
    residual are left, or x itself.

    Randomness comes from torch's generator of x's device (or ``generator``), one draw of two integers a call, so that
    torch.manual_seed repeats a run; or from ``seed``, an integer or a seed and an offset of 64 bits. A mask is then a
    function of the seed and of the elements' order in memory, on every device.
    Source: Srivastava et al. 2014 (JMLR 15), in the inverted form; Philox: Salmon et al. 2011.

    Raises:
        TypeError: x is no floating tensor.
        ValueError: p is outside [0, 1] or no number; shapes that do not fit; an unknown activation; inplace with a bias,
            an activation or a residual.
    """
    return _run(x, p, training, ELEMENT, inplace, bias, act, residual, generator, seed)


def dropout2d(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: Seed | None = None,
) -> Tensor:
    """dropout of whole channels of each sample of x [N, C, ...]; else as `dropout`. A bias asks for [N, C, H, W] or [N, C].

    The mask is a function of the seed and of the channel alone, whatever x's memory layout.
    Source: Tompson et al. 2015 (arXiv 1411.4280, section 3.2).

    Raises:
        TypeError, ValueError: as `dropout`; x has fewer than two dimensions.
    """
    if bias is not None and x.dim() not in (2, 4):
        raise ValueError(f"bias: got one for x of shape {shape_of(x)}, expected [N, C, H, W] or [N, C]")
    return _run(x, p, training, CHANNEL, inplace, bias, act, residual, generator, seed)


def drop_path(
    x: Tensor,
    drop_prob: float = 0.0,
    training: bool = True,
    scale_by_keep: bool = True,
    inplace: bool = False,
    *,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: Seed | None = None,
) -> Tensor:
    """dropout of whole samples of x [N, ...] (stochastic depth); else as `dropout`.

    With ``residual`` it is a residual block's last step: drop_path(x) + residual in one pass. Without ``scale_by_keep``
    what stays is not divided by 1 - drop_prob. Argument names: timm's drop_path.
    Source: Huang et al. 2016 (arXiv 1603.09382); Larsson et al. 2017 (arXiv 1605.07648) call it drop-path.

    Raises:
        TypeError, ValueError: as `dropout`.
    """
    return _run(x, drop_prob, training, SAMPLE, inplace, bias, act, residual, generator, seed, scale_by_keep)
