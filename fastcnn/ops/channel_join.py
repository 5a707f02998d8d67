"""Tensors side by side along the channels of one NHWC buffer that their makers write to: a concatenation without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from fastcnn.cpu import memory
from fastcnn.ops.affine_act import copy_into
from fastcnn.ops.layout import empty_nhwc, to_nhwc


def is_traced(x: Tensor) -> bool:
    """Whether nothing is written in place: a graph is being made of what runs, or x has no memory."""
    compiler = torch.compiler
    return compiler.is_compiling() or compiler.is_exporting() or torch.jit.is_tracing() or isinstance(x, FakeTensor)


def check_sizes(shapes: Sequence[Sequence[int]]) -> None:
    """Raises ValueError unless the outputs of these shapes can stand side by side."""
    if len({(shape[0], *shape[2:]) for shape in shapes}) != 1:
        found = ", ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"branches: got outputs of shapes {found or 'none'}, expected the same N, H and W in each")


def new_buffer(shapes: Sequence[Sequence[int]], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised NHWC buffer for tensors of these shapes side by side, on like's device, in its dtype unless given."""
    n, _, *size = shapes[0]
    empty = memory.empty_nhwc if like.device.type == "cpu" else empty_nhwc
    return empty(n, sum(shape[1] for shape in shapes), *size, like=like, dtype=dtype)


def channel_slices(buffer: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """The channels of an NHWC buffer in slices of these widths, for their makers to write to.

    Each has a version counter of its own: that a slice is written does not make its neighbours look modified.
    """
    slices, first = [], 0
    for width in widths:
        slices.append(buffer.data[:, first : first + width])
        first += width
    return slices


def _is_there(part: Tensor, place: Tensor) -> bool:
    return part.data_ptr() == place.data_ptr() and part.stride() == place.stride()


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, destination, *parts):
        buffer, slices = destination
        reads = False
        for part, place in zip(parts, slices, strict=True):
            if _is_there(part, place):
                reads |= getattr(part.grad_fn, "keeps_output", False)
            else:
                copy_into(place, part)
        ctx.widths = [place.shape[1] for place in slices]
        # A part's own version counter does not see a later write to the buffer. Where its backward reads it, this one does.
        if reads:
            ctx.save_for_backward(buffer)
        return buffer

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        _ = ctx.saved_tensors  # raises where the buffer was modified
        return None, *to_nhwc(grad).split(ctx.widths, 1)


def join_channels(buffer: Tensor, slices: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """The buffer as the differentiable concatenation of parts, each of which lies in its slice or is copied there.

    Shapes: buffer [N, C, H, W] in NHWC, of which ``slices`` are the `channel_slices`; parts as their slices.
    Dtypes: all of one.
    """
    return _Join.apply((buffer, slices), *parts)
