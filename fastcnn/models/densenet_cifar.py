"""DenseNet-BC for CIFAR (Huang et al. 2016, arXiv 1608.06993), as pytorchcv builds it."""

from __future__ import annotations

import os
from collections import OrderedDict

import torch
from torch import Tensor, nn

from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn import FusedSequential
from fastcnn.nn.dense import DenseUnit, fold_dense_units, run_dense_units, transition, transition_units
from fastcnn.nn.folded import FoldedClassifier
from fastcnn.nn.sequential import fold_layers, fold_units

Source = str | os.PathLike[str] | None
BOTTLENECK = 4


def _pre_conv(channels: int, outputs: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(channels), activ=nn.ReLU(inplace=True), conv=conv))


class CIFARDenseUnit(DenseUnit):
    """A layer with pytorchcv's keys (``conv1.bn``, ``conv1.conv``, ``conv2.bn``, ``conv2.conv``)."""

    def __init__(self, channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        self.conv1 = _pre_conv(channels, BOTTLENECK * growth_rate, 1)
        self.conv2 = _pre_conv(BOTTLENECK * growth_rate, growth_rate, 3)
        self.drop_rate = float(drop_rate)

    def norms(self) -> tuple[nn.Module, nn.Module]:
        """The two BatchNorms."""
        return self.conv1.bn, self.conv2.bn

    def convs(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """The 1x1 and the 3x3 convolution."""
        return self.conv1.conv, self.conv2.conv


class CIFARTransition(nn.Module):
    """A transition with pytorchcv's keys (``conv.bn``, ``conv.conv``); Transition has torchvision's."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = _pre_conv(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to [N, outputs, H // 2, W // 2]."""
        return transition(x, self.conv.bn, self.conv.conv)

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize)."""
        return fold_units(transition_units(self.conv.bn, self.conv.conv), dtype)


class CIFARDenseStage(nn.Sequential):
    """A transition, where there is one, and a block's layers in one buffer."""

    def _parts(self) -> tuple[list[nn.Module], list[DenseUnit]]:
        units = [layer for layer in self if isinstance(layer, DenseUnit)]
        return [layer for layer in self if not isinstance(layer, DenseUnit)], units

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        before, units = self._parts()
        for layer in before:
            x = layer(x)
        return run_dense_units(x, units)

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), or None where a part has none."""
        before, units = self._parts()
        parts = [*(layer.folded(dtype) for layer in before), fold_dense_units(units, dtype)]
        return None if any(part is None for part in parts) else nn.Sequential(*parts)


class CIFARDenseNet(nn.Module):
    """DenseNet-BC of 6n + 4 layers for 32 x 32 images, with the state_dict keys of pytorchcv's CIFARDenseNet.

    Args:
        depth: 6n + 4: 100, 190 or 250 in the paper.
        growth_rate: channels that a layer adds.
        num_classes: outputs of the classifier.
        drop_rate: probability of dropout after every layer, in training (the paper: 0.2 without augmentation).

    Shapes: x [N, 3, H, W], normalised RGB in NCHW or NHWC memory; returns logits [N, num_classes]. Dtypes: float32,
    bfloat16, float16, float64; autocast is respected.

    Raises:
        ValueError: a depth that is not 6n + 4.
        TypeError, ValueError: an input that is no [N, 3, H, W] float tensor.
    """

    def __init__(self, depth: int, growth_rate: int, num_classes: int = 10, drop_rate: float = 0.0) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth: got {depth}, expected 6n + 4: 10, 16, 22, ...")
        channels = 2 * growth_rate
        layers = OrderedDict(init_block=nn.Conv2d(3, channels, 3, padding=1, bias=False))
        for i in (1, 2, 3):
            stage = OrderedDict()
            if i > 1:
                stage[f"trans{i}"] = CIFARTransition(channels, channels // 2)
                channels //= 2
            for j in range(1, (depth - 4) // 6 + 1):
                stage[f"unit{j}"] = CIFARDenseUnit(channels, growth_rate, drop_rate)
                channels += growth_rate
            layers[f"stage{i}"] = CIFARDenseStage(stage)
        norm = OrderedDict(bn=nn.BatchNorm2d(channels), activ=nn.ReLU(inplace=True))
        layers["post_activ"] = FusedSequential(norm)
        layers["final_pool"] = nn.AdaptiveAvgPool2d(1)
        self.features = FusedSequential(layers)
        self.output = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        return self.output(self.features(x).flatten(1))

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize)."""
        features = fold_layers(list(self.features)[:-1], dtype)
        return None if features is None else nn.Sequential(*features, FoldedClassifier(self.output, dtype))


def _build(depth: int, growth_rate: int, num_classes: int, weights: Source, drop_rate: float) -> CIFARDenseNet:
    model = CIFARDenseNet(depth, growth_rate, num_classes, drop_rate)
    return model if weights is None else load_weights(model, weights)


@register(image_size=32)
def densenet_bc40_12(num_classes: int = 10, weights: Source = None, drop_rate: float = 0.0) -> CIFARDenseNet:
    """DenseNet-BC (L = 40, k = 12): 176,122 parameters and 72 M multiply-adds at 32 x 32.

    Args: ``weights`` is a path or a URL of a .pth or .safetensors file with pytorchcv's keys; ``drop_rate`` as
    `CIFARDenseNet`.

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`).
        OSError: weights that cannot be read.
    """
    return _build(40, 12, num_classes, weights, drop_rate)


@register(image_size=32)
def densenet_bc100_12(num_classes: int = 10, weights: Source = None, drop_rate: float = 0.0) -> CIFARDenseNet:
    """DenseNet-BC (L = 100, k = 12): 769,162 parameters and 288 M multiply-adds; as `densenet_bc40_12`."""
    return _build(100, 12, num_classes, weights, drop_rate)


@register(image_size=32)
def densenet_bc250_24(num_classes: int = 10, weights: Source = None, drop_rate: float = 0.0) -> CIFARDenseNet:
    """DenseNet-BC (L = 250, k = 24): 15,324,406 parameters and 5.42 G multiply-adds; as `densenet_bc40_12`."""
    return _build(250, 24, num_classes, weights, drop_rate)


@register(image_size=32)
def densenet_bc190_40(num_classes: int = 10, weights: Source = None, drop_rate: float = 0.0) -> CIFARDenseNet:
    """DenseNet-BC (L = 190, k = 40): 25,624,430 parameters and 9.30 G multiply-adds; as `densenet_bc40_12`."""
    return _build(190, 40, num_classes, weights, drop_rate)
