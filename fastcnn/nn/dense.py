"""DenseNet's layers: a block is one buffer that every layer writes its slice of, and nothing is concatenated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcnn import ops
from fastcnn.nn.folded import FoldedChain
from fastcnn.nn.fused import (
    BATCH_NORMS,
    Unit,
    batch_norm,
    check_channels,
    convolutions,
    has_hooks,
    is_foldable,
    run_units,
)
from fastcnn.nn.sequential import fold_units


class DenseUnit(nn.Module, ABC):
    """What a block runs as one layer: BatchNorm, ReLU, 1x1 convolution, BatchNorm, ReLU, 3x3 convolution, dropout.

    Subclasses name the submodules (`norms`, `convs`). Alone, a unit is one fused chain.
    """

    fused_unless_hooked = True  # `fastcnn.explain` puts no hook of its own on it
    drop_rate: float

    @abstractmethod
    def norms(self) -> tuple[nn.Module, nn.Module]:
        """The two BatchNorms."""

    @abstractmethod
    def convs(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """The 1x1 and the 3x3 convolution."""

    def units(self) -> list[Unit]:
        """The layer as a chain."""
        (norm1, norm2), (conv1, conv2) = self.norms(), self.convs()
        return [Unit((), norm1, "relu"), Unit((conv1,), norm2, "relu"), Unit((conv2,))]

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """The layer's own features [N, growth rate, H, W] from all before it, one tensor or several to concatenate."""
        x = x if isinstance(x, Tensor) else torch.cat(list(x), 1)
        y = run_units(x, self.units())
        return ops.dropout(y, self.drop_rate) if self.drop_rate and self.training else y

    def is_fusable(self) -> bool:
        """Whether a block may run the unit without calling it: no hook on it, and only what the op computes."""
        conv1, conv2 = self.convs()
        shaped = (
            conv1.kernel_size == conv1.stride == conv2.stride == conv2.dilation == (1, 1)
            and conv1.padding == (0, 0)
            and (conv2.kernel_size, conv2.padding, conv2.padding_mode) == ((3, 3), (1, 1), "zeros")
            and conv1.groups == conv2.groups == 1
            and conv1.bias is conv2.bias is None
        )
        return not has_hooks(self) and shaped and all(isinstance(norm, BATCH_NORMS) for norm in self.norms())

    def arguments(self) -> ops.DenseLayer:
        """The unit as `fastcnn.ops.dense_block` takes it, for one forward."""
        (norm1, norm2), (conv1, conv2) = self.norms(), self.convs()
        return ops.DenseLayer(batch_norm(norm1), conv1.weight, batch_norm(norm2), conv2.weight)


def run_dense_units(x: Tensor, units: Sequence[DenseUnit], memory: str = "fast") -> Tensor:
    """x and the features of every unit, each made from all before it, along the channels; in one buffer.

    A unit that has hooks, or was changed into something else, is called: then everything is concatenated as in torch.

    Raises:
        TypeError, ValueError: an input that does not fit the first unit.
    """
    check_channels(x, units[0].convs()[0].in_channels)
    rates = {unit.drop_rate if unit.training else 0.0 for unit in units}
    if len(rates) > 1 or not all(unit.is_fusable() for unit in units):
        for unit in units:
            x = torch.cat((x, unit(x)), 1)
        return x
    return ops.dense_block(x, [unit.arguments() for unit in units], rates.pop(), memory)


class FoldedDenseBlock(nn.Module):
    """A dense block in inference form: per unit a 1x1 chain, with its BatchNorm as its prologue, and a 3x3 one."""

    def __init__(self, units: Sequence[DenseUnit], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        reduce, grow = [], []
        for unit in units:
            pre, first, second = convolutions(unit.units(), frozen=True)
            reduce.append(FoldedChain([pre, first], dtype=dtype))
            grow.append(FoldedChain([second], dtype=dtype))
        self.reduce, self.grow = nn.ModuleList(reduce), nn.ModuleList(grow)
        self.growth_rate = units[0].convs()[1].out_channels

    def forward(self, x: Tensor) -> Tensor:
        """The block's output [N, C, H, W], channels_last.

        Raises:
            ValueError: x has another rank or number of channels.
        """
        c = x.shape[1]
        buffer = torch.ops.fastcnn.widened(x, c + self.growth_rate * len(self.grow))
        for reduce, grow in zip(self.reduce, self.grow, strict=True):
            grow(reduce(buffer[:, :c]), out=buffer[:, c : c + self.growth_rate])
            c += self.growth_rate
        return buffer


def fold_dense_units(units: Sequence[DenseUnit], dtype: torch.dtype | None) -> nn.Module | None:
    """The inference form of a block, or None where a BatchNorm has none."""
    foldable = all(unit.is_fusable() and is_foldable(unit.units()) for unit in units)
    return FoldedDenseBlock(units, dtype) if foldable else None


class DenseLayer(DenseUnit):
    """torchvision's _DenseLayer with its keys (``norm1``, ``conv1``, ``norm2``, ``conv2``); memory_efficient is the block's.

    Args:
        num_input_features: channels of all features before it.
        growth_rate: channels that it adds.
        bn_size: the 1x1 convolution makes bn_size * growth_rate channels.
        drop_rate: probability of dropout of its features, in training.

    Shapes: x [N, num_input_features, H, W], or a list of tensors with so many channels; the result
    [N, growth_rate, H, W] is channels_last. Source: DenseNet (arXiv 1608.06993, section 3).
    """

    def __init__(self, num_input_features: int, growth_rate: int, bn_size: int = 4, drop_rate: float = 0.0) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.conv1 = nn.Conv2d(num_input_features, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = float(drop_rate)

    def norms(self) -> tuple[nn.Module, nn.Module]:
        """``norm1`` and ``norm2``."""
        return self.norm1, self.norm2

    def convs(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """``conv1`` and ``conv2``."""
        return self.conv1, self.conv2


class DenseBlock(nn.ModuleDict):
    """torchvision's _DenseBlock in one buffer: the same arguments and keys (``denselayer1``, ``denselayer2``, ...).

    The layers hold the state. They are called only where they have hooks; then features are concatenated as in torch.

    Args:
        num_layers: layers of the block.
        num_input_features, growth_rate, bn_size, drop_rate: DenseLayer's.
        memory_efficient: whether backward computes the 1x1 outputs again instead of keeping them.

    Shapes: x [N, num_input_features, H, W] in any memory format; the result
    [N, num_input_features + num_layers * growth_rate, H, W] is channels_last.
    Source: DenseNet (arXiv 1608.06993, section 3); its memory as arXiv 1707.06990.

    Raises:
        TypeError, ValueError: an input that does not fit the first layer.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        self.memory_efficient = memory_efficient
        for i in range(num_layers):
            layer = DenseLayer(num_input_features + i * growth_rate, growth_rate, bn_size, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """x and every layer's features along the channels."""
        return run_dense_units(x, list(self.values()), "min" if self.memory_efficient else "fast")

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), or None where a BatchNorm keeps no running statistics."""
        return fold_dense_units(list(self.values()), dtype)


def transition(x: Tensor, norm: nn.Module, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution of the 2x2 averages of relu(norm(x)), as one chain.

    Averaging commutes with the convolution: before it, the product has a quarter of the pixels.

    Raises:
        TypeError, ValueError: an input that does not fit.
    """
    return run_units(x, transition_units(norm, conv))


def transition_units(norm: nn.Module, conv: nn.Conv2d) -> list[Unit]:
    """A transition as a chain."""
    return [Unit((), norm, "relu"), Unit((), pool=2), Unit((conv,))]


class Transition(nn.Sequential):
    """torchvision's _Transition: BatchNorm, ReLU, 1x1 convolution, 2x2 average pooling; keys ``norm`` and ``conv``.

    Runs as one chain with the pooling before the product. The layers hold the state; they are not called.

    Args:
        num_input_features, num_output_features: channels in and out.

    Shapes: x [N, num_input_features, H, W]; the result [N, num_output_features, H // 2, W // 2] is channels_last.
    Source: DenseNet (arXiv 1608.06993, section 3, "pooling layers").

    Raises:
        TypeError, ValueError: an input that does not fit.
    """

    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_input_features, num_output_features, 1, bias=False)
        self.pool = nn.AvgPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The pooled product."""
        return transition(x, self.norm, self.conv)

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), or None where the BatchNorm keeps no running statistics."""
        return fold_units(transition_units(self.norm, self.conv), dtype)
