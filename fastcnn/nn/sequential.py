"""nn.Sequential with its runs of convolution, BatchNorm and activation fused: features, shortcuts, heads."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastcnn.nn.basic_conv2d import BasicConv2d
from fastcnn.nn.folded import FoldedActivation, FoldedChain, folding_of
from fastcnn.nn.folded_average import fold_average
from fastcnn.nn.fused import ACTIVATIONS, BATCH_NORMS, Unit, activation_name, convolutions, is_foldable, run_units
from fastcnn.nn.sync_batch_norm import SyncBatchNorm2d

Segment = list[Unit] | nn.Module

_LONGEST = 16  # convolutions of one chain
_NORMS = (*BATCH_NORMS, SyncBatchNorm2d)


def _extended(units: list[Unit], layer: nn.Module) -> list[Unit] | None:
    """The chain with one more layer, or None where it must end before that layer.

    Subclasses compute something else or have state that only their own forward handles: they are no part of a chain.
    """
    last = units[-1] if units else None
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        return [*units, Unit((layer,))] if len(units) < _LONGEST else None
    if type(layer) is BasicConv2d:
        return [*units, *layer.units()] if len(units) < _LONGEST else None
    if type(layer) in _NORMS:
        if last is None:
            return [Unit((), layer)]
        return [*units[:-1], last._replace(norm=layer)] if last.norm is None and last.act == "none" else None
    if type(layer) in ACTIVATIONS:
        act = activation_name(layer)
        if last is None:
            return [Unit((), None, act)]
        return [*units[:-1], last._replace(act=act)] if last.act == "none" else None
    return None


def segments(layers: Iterable[nn.Module]) -> list[Segment]:
    """The layers in their order as chains' units where they can be fused, as they are elsewhere."""
    found: list[Segment] = []
    units: list[Unit] = []
    for layer in layers:
        extended = _extended(units, layer)
        if extended is None and units:
            found.append(units)
            extended = _extended([], layer)
        if extended is None:
            found.append(layer)
        units = extended or []
    return [*found, units] if units else found


def run_segment(x: Tensor, segment: Segment) -> Tensor:
    """One segment's output.

    Raises:
        TypeError, ValueError: an input that does not fit it.
    """
    return segment(x) if isinstance(segment, nn.Module) else run_units(x, segment)


def run_layers(x: Tensor, layers: Iterable[nn.Module]) -> Tensor:
    """What nn.Sequential(*layers) computes, in fused chains.

    Raises:
        TypeError, ValueError: an input that does not fit a layer.
    """
    for segment in segments(layers):
        x = run_segment(x, segment)
    return x


def fold_units(units: list[Unit], dtype: torch.dtype | None) -> nn.Module | None:
    """The inference form of a chain, or None where a BatchNorm keeps no running statistics."""
    if not is_foldable(units):
        return None
    convs = convolutions(units, frozen=True)
    return FoldedChain(convs, dtype=dtype) if any(unit.convs for unit in units) else FoldedActivation(convs[0], dtype)


def fold_module(module: nn.Module, dtype: torch.dtype | None) -> nn.Module | None:
    """The inference form of a module; itself where it has no tensors; None where it has some and no such form."""
    folded = folding_of(module)
    if folded:
        return folded(dtype)
    if type(module) is nn.Sequential:
        return fold_layers(module, dtype)
    tensors = [*module.parameters(), *module.buffers()]
    return None if tensors else module


def fold_layers(layers: Iterable[nn.Module], dtype: torch.dtype | None) -> nn.Sequential | None:
    """The inference form of nn.Sequential(*layers), or None where a layer has none."""
    return fold_segments(segments(layers), dtype)


def fold_segments(parts: Iterable[Segment], dtype: torch.dtype | None) -> nn.Sequential | None:
    """The inference form of segments one after the other, or None where one has none."""
    folded, parts = [], list(parts)
    while parts:
        segment = parts.pop(0)
        layer = fold_average(segment, parts[0], dtype) if parts else None
        if layer is not None:
            after = parts.pop(0)[1:]
            parts[:0] = [after] if after else []
        else:
            fold = fold_module if isinstance(segment, nn.Module) else fold_units
            layer = fold(segment, dtype)
        if layer is None:
            return None
        folded.append(layer)
    return nn.Sequential(*folded)


class FusedSequential(nn.Sequential):
    """nn.Sequential that runs convolutions with the BatchNorms and activations around them as fused chains.

    Arguments, keys, slices and submodules are nn.Sequential's; any other layer is called as it is. The layers of a chain
    are not called, so hooks on them do not fire.

    Shapes: those of its layers; a chain takes [N, K, H, W] in any memory format and returns channels_last.

    Raises:
        TypeError, ValueError: an input that does not fit a layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's output."""
        return run_layers(x, self)

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), or None where a layer has none."""
        return fold_layers(self, dtype)
