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

from fastcnn.ops import BatchNorm, Conv, conv_chain
from fastcnn.ops.conv_bn_act import narrowest_op
from fastcnn.ops.stages import sizes_along
from fastcnn.ops.validation import Labels, check_input, shape_of

Pair = tuple[int, int]

ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.Identity: "none"}
_MODULES = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish}


def _labels(position: int) -> Labels:
    name = f"convolution {position}"
    weights = (f"{name}'s weight", f"{name}'s pointwise weight")
    return Labels(weights, f"{name}'s norm", act=f"{name}'s act", bias=f"{name}'s bias")


# What messages call the parts of a layer's convolutions, which its caller did not pass; no layer has as many.
_LABELS = tuple(_labels(i + 1) for i in range(16))
_PRE_ACTIVATION = Labels(norm="the pre-activation's norm", act="the pre-activation's act")


BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Unit(NamedTuple):
    """One convolution of a fused layer as its submodules: what `conv_chain` calls a Conv.

    Two convolutions are a depthwise, then a pointwise, with nothing between; none, as a chain's first, a pre-activation,
    or with ``pool`` the average of windows of so many pixels along both axes. ``statistics`` are the batch's mean and variance
    of a pre-activation's input, where they are known.
    """

    convs: tuple[nn.Conv2d, ...]
    norm: nn.BatchNorm2d | None = None
    act: str = "none"
    pool: int = 0
    statistics: tuple[Tensor, Tensor] | None = None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or torch.nn.modules.module._has_any_global_hook()


def activation_name(module: nn.Module | None) -> str:
    """The name that the kernels know an activation module by.

    Raises:
        TypeError: no kernel applies this activation.
    """
    if module is None:
        return "none"
    try:
        return ACTIVATIONS[type(module)]
    except KeyError:
        expected = ", ".join(m.__name__ for m in ACTIVATIONS)
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
    return narrowest_op(conv.in_channels, conv.kernel_size, padding_of(conv), conv.groups)


def _check_norm(norm: nn.Module) -> None:
    if not isinstance(norm, BATCH_NORMS):
        raise TypeError(f"norm: got {type(norm).__name__}, expected nn.BatchNorm2d, which a fused layer can apply")


def _process_group(norm: nn.Module) -> torch.distributed.ProcessGroup | None:
    """The processes that share a synchronised BatchNorm's batch statistics; None where there are no others."""
    if not hasattr(norm, "process_group") or not norm.training:
        return None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    group = norm.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


def batch_norm(norm: nn.BatchNorm2d) -> BatchNorm:
    """A BatchNorm2d as the ops take it for one forward; in training mode it counts the batch, as torch's forward does.

    Raises:
        TypeError: not an nn.BatchNorm2d or nn.SyncBatchNorm.
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
    return BatchNorm(norm.weight, norm.bias, mean, var, training, momentum or 0.0, norm.eps, _process_group(norm))


def frozen_batch_norm(norm: nn.BatchNorm2d) -> BatchNorm:
    """A BatchNorm2d in its eval form, whatever mode it is in."""
    _check_norm(norm)
    return BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.0, norm.eps)


def _conv(unit: Unit, frozen: bool) -> Conv:
    norm = unit.norm
    applied = None if norm is None else frozen_batch_norm(norm) if frozen else batch_norm(norm)
    if unit.pool:
        return Conv("average", stride=(unit.pool, unit.pool))
    if not unit.convs:
        return Conv("identity", norm=applied, act=unit.act, statistics=unit.statistics)
    first = unit.convs[0]
    return Conv(
        "separable" if len(unit.convs) == 2 else op_of(first),
        tuple(conv.weight for conv in unit.convs),
        first.stride,
        padding_of(first),
        first.dilation,
        first.groups,
        applied,
        unit.act,
        unit.convs[-1].bias,
    )


def convolutions(units: Sequence[Unit], frozen: bool = False) -> list[Conv]:
    """The units as conv_chain takes them; ``frozen`` gives the eval form and leaves every module as it was."""
    return [_conv(unit, frozen) for unit in units]


def check_channels(x: Tensor, channels: int) -> None:
    """Raises unless x is a floating [N, channels, H, W] tensor: a layer's weights are its own, so x is what is wrong."""
    check_input(x)
    if x.shape[1] != channels:
        raise ValueError(f"x: got shape {shape_of(x)}, expected [N, {channels}, H, W]")


def _check_input(x: Tensor, units: Sequence[Unit]) -> None:
    convs, norm = next((unit.convs for unit in units if unit.convs), None), units[0].norm
    if convs:
        check_channels(x, convs[0].in_channels)
    elif norm is not None:
        _check_norm(norm)
        check_channels(x, norm.num_features)


def run_units(
    x: Tensor,
    units: Sequence[Unit],
    in_act: str = "none",
    residual: Tensor | None = None,
    act_after_residual: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The units as one conv_chain; x is checked before any BatchNorm counts the batch. With ``out`` it is written there.

    Shapes: x [N, K, H, W] with the first convolution's K; the result and residual [N, C, P, Q], channels_last.

    Raises:
        TypeError, ValueError: an input that does not fit the first convolution or a later one.
    """
    _check_input(x, units)
    labels = _LABELS if units[0].convs else (_PRE_ACTIVATION, *_LABELS)
    return conv_chain(x, convolutions(units), in_act, residual, labels, act_after_residual, out)


def output_shape(x: Tensor, units: Sequence[Unit]) -> tuple[int, int, int, int]:
    """The [N, C, P, Q] of what run_units makes of x; P or Q is below 1 where it refuses x.

    Raises:
        TypeError, ValueError: an input that does not fit the first convolution.
    """
    _check_input(x, units)
    channels = next((unit.convs[-1].out_channels for unit in reversed(units) if unit.convs), x.shape[1])
    return x.shape[0], channels, *sizes_along(x.shape, convolutions(units, frozen=True))[-1]


def is_foldable(units: Sequence[Unit]) -> bool:
    """Whether every normalisation is a BatchNorm2d with running statistics, which weights can absorb."""
    norms = [unit.norm for unit in units if unit.norm is not None]
    return all(isinstance(n, BATCH_NORMS) and n.running_mean is not None for n in norms)


class FusedModule(nn.Module, ABC):
    """A layer whose forward is one conv_chain over `units()`; subclasses say what the units are."""

    in_act = "none"
    act_after_residual = False

    @abstractmethod
    def units(self) -> list[Unit]:
        """The chain's convolutions, read from the submodules at each call."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer's output [N, C, P, Q], channels_last, plus ``residual`` of the same shape if one is given.

        Raises:
            TypeError, ValueError: an input that does not fit the layer.
        """
        return run_units(x, self.units(), self.in_act, residual, self.act_after_residual)

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), or None where a BatchNorm keeps no running statistics."""
        from fastcnn.nn.folded import FoldedChain

        units = self.units()
        if not is_foldable(units):
            return None
        return FoldedChain(convolutions(units, frozen=True), self.in_act, dtype, self.act_after_residual)
