"""What every fused layer is: real torch submodules that hold the state, and one conv_chain that runs them.

The submodules are ordinary nn.Conv2d and nn.BatchNorm2d, so keys, initialisation, ``bn.eval()``, ``requires_grad_``,
``momentum=None``, ``deepcopy`` and ``pickle`` behave as torch's. They are never called: a fused layer reads their
parameters, so forward hooks on them do not fire. Put a hook on the fused layer itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcnn.ops import Affine, BatchNorm, Conv, conv_chain
from fastcnn.ops.validation import Labels, check_input, shape_of

Pair = tuple[int, int]

_ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.Identity: "none"}
_MODULES = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish}


def _labels(position: int) -> Labels:
    name = f"convolution {position}"
    return Labels((f"{name}'s weight", f"{name}'s pointwise weight"), f"{name}'s norm", act=f"{name}'s act")


# What messages call the parts of a layer's convolutions, which its caller did not pass; no layer has as many.
_LABELS = tuple(_labels(i + 1) for i in range(16))


class Unit(NamedTuple):
    """One convolution of a fused layer as its submodules: what `conv_chain` calls a Conv."""

    convs: tuple[nn.Conv2d, ...]  # two: depthwise, then pointwise, with nothing between
    norm: nn.BatchNorm2d | None = None
    act: str = "none"


def activation_name(module: nn.Module | None) -> str:
    """The name that the kernels know an activation module by.

    Raises:
        TypeError: no kernel applies this activation.
    """
    if module is None:
        return "none"
    try:
        return _ACTIVATIONS[type(module)]
    except KeyError:
        expected = ", ".join(m.__name__ for m in _ACTIVATIONS)
        raise TypeError(f"activation: got {type(module).__name__}, expected one of {expected}") from None


def activation_module(name: str) -> nn.Module:
    """The torch module of an activation's name."""
    return _MODULES[name]()


def padding_of(conv: nn.Conv2d) -> Pair:
    """A convolution's zero padding in pixels, "same" and "valid" resolved."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        (r, s), (dr, ds) = conv.kernel_size, conv.dilation
        return dr * (r - 1) // 2, ds * (s - 1) // 2
    return conv.padding


def op_of(conv: nn.Conv2d) -> str:
    """The narrowest op that computes a convolution."""
    if conv.groups == 1:
        pointwise = conv.kernel_size == (1, 1) and padding_of(conv) == (0, 0)
        return "pointwise" if pointwise else "conv2d"
    odd = all(k % 2 for k in conv.kernel_size) and max(conv.kernel_size) <= 31
    return "depthwise" if conv.groups == conv.in_channels and odd else "conv2d"


def _check_norm(norm: nn.Module) -> None:
    if not isinstance(norm, nn.BatchNorm2d):
        raise TypeError(f"norm: got {type(norm).__name__}, expected nn.BatchNorm2d, which a fused layer can apply")


def batch_norm(norm: nn.BatchNorm2d) -> BatchNorm:
    """A BatchNorm2d as the ops take it for one forward; in training mode it counts the batch, as torch's forward does.

    Raises:
        TypeError: not an nn.BatchNorm2d (SyncBatchNorm, for example, needs statistics of other processes).
    """
    _check_norm(norm)
    momentum, mean, var = norm.momentum, norm.running_mean, norm.running_var
    tracked = norm.num_batches_tracked
    training = norm.training or mean is None
    if norm.training and norm.track_running_stats and tracked is not None:
        tracked.add_(1)
        if momentum is None:  # cumulative moving average
            momentum = 1.0 / float(tracked)
    if norm.training and not norm.track_running_stats:
        mean = var = None
    return BatchNorm(norm.weight, norm.bias, mean, var, training, momentum or 0.0, norm.eps)


def frozen_batch_norm(norm: nn.BatchNorm2d) -> BatchNorm:
    """A BatchNorm2d in its eval form, whatever mode it is in."""
    _check_norm(norm)
    return BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.0, norm.eps)


def _conv(unit: Unit, frozen: bool) -> Conv:
    first, norm = unit.convs[0], unit.norm
    if norm is not None:
        applied = frozen_batch_norm(norm) if frozen else batch_norm(norm)
    else:
        bias = unit.convs[-1].bias
        applied = None if bias is None else Affine(None, bias)
    return Conv(
        "separable" if len(unit.convs) == 2 else op_of(first),
        tuple(conv.weight for conv in unit.convs),
        first.stride,
        padding_of(first),
        first.dilation,
        first.groups,
        applied,
        unit.act,
    )


def convolutions(units: Sequence[Unit], frozen: bool = False) -> list[Conv]:
    """The units as conv_chain takes them; ``frozen`` gives the eval form and leaves every module as it was."""
    return [_conv(unit, frozen) for unit in units]


def check_channels(x: Tensor, channels: int) -> None:
    """Raises unless x is a floating [N, channels, H, W] tensor: a layer's weights are its own, so x is what is wrong."""
    check_input(x)
    if x.shape[1] != channels:
        raise ValueError(f"x: got shape {shape_of(x)}, expected [N, {channels}, H, W]")


def run_units(x: Tensor, units: Sequence[Unit], in_act: str = "none", residual: Tensor | None = None) -> Tensor:
    """The units as one conv_chain; x is checked before any BatchNorm counts the batch.

    Shapes: x [N, K, H, W] with the first convolution's K; the result and residual [N, C, P, Q], channels_last.

    Raises:
        TypeError, ValueError: an input that does not fit the first convolution or a later one.
    """
    check_channels(x, units[0].convs[0].in_channels)
    return conv_chain(x, convolutions(units), in_act, residual, _LABELS)


def is_foldable(units: Sequence[Unit]) -> bool:
    """Whether every normalisation is a BatchNorm2d with running statistics, which weights can absorb."""
    norms = [unit.norm for unit in units if unit.norm is not None]
    return all(isinstance(n, nn.BatchNorm2d) and n.running_mean is not None for n in norms)


class FusedModule(nn.Module, ABC):
    """A layer whose forward is one conv_chain over `units()`; subclasses say what the units are."""

    in_act = "none"

    @abstractmethod
    def units(self) -> list[Unit]:
        """The chain's convolutions, read from the submodules at each call."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer's output [N, C, P, Q], channels_last, plus ``residual`` of the same shape if one is given.

        Raises:
            TypeError, ValueError: an input that does not fit the layer.
        """
        return run_units(x, self.units(), self.in_act, residual)

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), or None where a BatchNorm keeps no running statistics."""
        from fastcnn.nn.folded import FoldedChain

        units = self.units()
        if not is_foldable(units):
            return None
        return FoldedChain(convolutions(units, frozen=True), self.in_act, dtype)
