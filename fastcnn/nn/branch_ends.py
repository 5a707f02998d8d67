"""The last layers of branches: what each leaves in its slice of the concatenation, in training and in inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcnn.nn.folded import FoldedChain
from fastcnn.nn.folded_average import FoldedAverage
from fastcnn.nn.fused import Unit, has_hooks, output_shape, run_units
from fastcnn.nn.max_pool2d import MaxPool2d
from fastcnn.ops.channel_join import channel_slices, check_sizes, is_traced, join_channels, new_buffer
from fastcnn.ops.layout import autocast_dtype


class End(NamedTuple):
    """A branch's last layer, a chain as its units or folded, or a module, with its input."""

    x: Tensor
    layer: list[Unit] | nn.Module

    def shape(self) -> tuple[int, ...] | None:
        """The output's shape, where the layer can write into a slice and takes its input; else None.

        A pooling with hooks is called as any module is: they may change what it reads or returns.
        """
        layer = self.layer
        if not isinstance(layer, nn.Module):
            shape = output_shape(self.x, layer)
        elif type(layer) in (FoldedChain, FoldedAverage) or self._is_fused_pooling():
            shape = layer.output_shape(self.x.shape)
        else:
            return None
        return shape if min(shape[2:]) >= 1 else None

    def _is_fused_pooling(self) -> bool:
        layer = self.layer
        return type(layer) is MaxPool2d and layer.is_fused(self.x) and not has_hooks(layer)

    def dtype(self) -> torch.dtype:
        """The output's, where the layer can write into a slice."""
        return self.x.dtype if isinstance(self.layer, nn.Module) else autocast_dtype(self.x)

    def run(self, out: Tensor | None = None) -> Tensor:
        """The output, in ``out`` where one is given."""
        if not isinstance(self.layer, nn.Module):
            return run_units(self.x, self.layer, out=out)
        return self.layer(self.x) if out is None else self.layer(self.x, out=out)


def concatenated(ends: Sequence[End]) -> Tensor:
    """Every end's output along the channels, in their order, [N, the sum of their channels, P, Q].

    Raises:
        TypeError, ValueError: an input that does not fit its layer, outputs that differ in more than their channels.
    """
    traced = any(is_traced(end.x) for end in ends)
    shapes = [None if traced else end.shape() for end in ends]
    # What cannot write into a slice runs first: only its output tells its shape.
    outputs = [end.run() if shape is None else None for end, shape in zip(ends, shapes, strict=True)]
    shapes = [shape or y.shape for shape, y in zip(shapes, outputs, strict=True)]
    check_sizes(shapes)
    dtypes = {end.dtype() if y is None else y.dtype for end, y in zip(ends, outputs, strict=True)}
    if all(y is not None for y in outputs) or len(dtypes) > 1:
        return torch.cat([end.run() if y is None else y for end, y in zip(ends, outputs, strict=True)], 1)
    buffer = new_buffer(shapes, like=ends[0].x, dtype=dtypes.pop())
    slices = channel_slices(buffer, [shape[1] for shape in shapes])
    parts = [end.run(place) if y is None else y for end, y, place in zip(ends, outputs, slices, strict=True)]
    return join_channels(buffer, slices, parts)
