"""Xception (Chollet 2017, arXiv 1610.02357), as timm's legacy_xception builds it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn.folded import FoldedChain, FoldedClassifier, FoldedResidual
from fastcnn.nn.fused import Unit, activation_name, convolutions, is_foldable, run_units
from fastcnn.ops import max_pool2d


class SeparableConv(nn.Module):
    """The state of a separable convolution: 3x3 depthwise ``conv1``, then ``pointwise``, with nothing between.

    The paper motivates with the pointwise convolution first and builds with the depthwise one first (section 3).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 1, 1, groups=in_channels, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def unit(self, norm: nn.BatchNorm2d, act: str) -> Unit:
        """This convolution with what follows it."""
        return Unit((self.conv1, self.pointwise), norm, act)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution alone; a fused block does not call it."""
        return run_units(x, [Unit((self.conv1, self.pointwise))])


def _units(layers: Sequence[nn.Module]) -> tuple[str, list[Unit]]:
    """The leading activation and the units of a sequence [ReLU] (separable, BatchNorm, [ReLU]) ... [MaxPool]."""
    in_act, units = "none", []
    for i, layer in enumerate(layers):
        if isinstance(layer, SeparableConv):
            after = layers[i + 2] if i + 2 < len(layers) else None
            act = activation_name(after) if isinstance(after, nn.ReLU) else "none"
            units.append(layer.unit(layers[i + 1], act))
        elif i == 0:
            in_act = activation_name(layer)
    return in_act, units


def _pool(x: Tensor, stride: int) -> Tensor:
    return x if stride == 1 else max_pool2d(x, (3, 3), (stride, stride), (1, 1))


class FoldedBlock(nn.Module):
    """The inference form of a Block whose skip is a convolution."""

    def __init__(self, rep: FoldedChain, skip: FoldedChain, stride: int) -> None:
        super().__init__()
        self.rep, self.skip, self.stride = rep, skip, stride

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; the skip's convolution adds the pooled branch as it stores."""
        return self.skip(x, _pool(self.rep(x), self.stride))


class Block(nn.Module):
    """Two or three ReLU, separable convolution, BatchNorm as one chain, then max-pooling, plus a skip.

    The skip is the input, added in the chain's last pass over memory, or a strided 1x1 convolution with BatchNorm,
    which adds the pooled branch in its own. Keys: timm's Block (``rep.N``, ``skip``, ``skipbn``).
    """

    def __init__(self, in_channels: int, out_channels: int, reps: int, stride: int, relu_first: bool, grow_first: bool):
        super().__init__()
        self.skip = None
        if out_channels != in_channels or stride != 1:
            self.skip = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.skipbn = nn.BatchNorm2d(out_channels)
        layers: list[nn.Module] = []
        for i in range(reps):
            grown = i > 0 if grow_first else i == reps
            inner = out_channels if grown else in_channels
            outer = out_channels if grow_first or i == reps - 1 else in_channels
            layers += [nn.ReLU(), SeparableConv(inner, outer), nn.BatchNorm2d(outer)]
        if not relu_first:
            layers = layers[1:]
        if stride != 1:
            layers.append(nn.MaxPool2d(3, stride, 1))
        self.rep = nn.Sequential(*layers)
        self.stride = stride

    def _skip_units(self) -> list[Unit]:
        return [Unit((self.skip,), self.skipbn)]

    def forward(self, x: Tensor) -> Tensor:
        """The block's output [N, out_channels, P, Q]."""
        in_act, units = _units(self.rep)
        if self.skip is None:
            return run_units(x, units, in_act, x)
        y = _pool(run_units(x, units, in_act), self.stride)
        return run_units(x, self._skip_units(), residual=y)

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize)."""
        in_act, units = _units(self.rep)
        skip = [] if self.skip is None else self._skip_units()
        if not is_foldable(units + skip):
            return None
        if not skip:
            return FoldedResidual(convolutions(units, True), in_act, dtype)
        rep = FoldedChain(convolutions(units, True), in_act, dtype)
        return FoldedBlock(rep, FoldedChain(convolutions(skip, True), dtype=dtype), self.stride)


class Xception(nn.Module):
    """Xception with the state_dict keys of timm's legacy_xception; every block is one or two fused chains.

    BatchNorm has eps 1e-5 and momentum 0.1, as timm's weights were converted and evaluated; Keras' own have 1e-3 and
    0.01. Max-pooling and strided skips pad one pixel on either side, where Keras pads the far side only.

    Args:
        num_classes: outputs of the classifier.
        dropout: probability of zeroing a feature before the classifier, in training (the paper: 0.5).

    Shapes: x [N, 3, H, W], RGB normalised to mean 0.5 and deviation 0.5, in NCHW or NHWC memory (299 x 299 in the paper);
    returns logits [N, num_classes]. Dtypes: float32, bfloat16, float16, float64; autocast is respected.

    Raises:
        TypeError, ValueError: an input that is no [N, 3, H, W] float tensor, or below 7 pixels.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.conv1 = nn.Conv2d(3, 32, 3, 2, 0, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.block1 = Block(64, 128, 2, 2, relu_first=False, grow_first=True)
        self.block2 = Block(128, 256, 2, 2, relu_first=True, grow_first=True)
        self.block3 = Block(256, 728, 2, 2, relu_first=True, grow_first=True)
        for i in range(4, 12):
            self.add_module(f"block{i}", Block(728, 728, 3, 1, relu_first=True, grow_first=True))
        self.block12 = Block(728, 1024, 2, 2, relu_first=True, grow_first=False)
        self.conv3 = SeparableConv(1024, 1536)
        self.bn3 = nn.BatchNorm2d(1536)
        self.conv4 = SeparableConv(1536, 2048)
        self.bn4 = nn.BatchNorm2d(2048)
        self.fc = nn.Linear(2048, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _blocks(self) -> list[nn.Module]:
        return [getattr(self, f"block{i}") for i in range(1, 13)]

    def _stem(self) -> list[Unit]:
        return [Unit((self.conv1,), self.bn1, "relu"), Unit((self.conv2,), self.bn2, "relu")]

    def _exit(self) -> list[Unit]:
        return [self.conv3.unit(self.bn3, "relu"), self.conv4.unit(self.bn4, "relu")]

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = run_units(x, self._stem())
        for block in self._blocks():
            x = block(x)
        x = run_units(x, self._exit())
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(F.dropout(x, self.dropout, self.training) if self.dropout else x)

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize)."""
        ends = (self._stem(), self._exit())
        blocks = [block.folded(dtype) for block in self._blocks()]
        if None in blocks or not all(map(is_foldable, ends)):
            return None
        stem, tail = (FoldedChain(convolutions(units, True), dtype=dtype) for units in ends)
        return nn.Sequential(stem, *blocks, tail, FoldedClassifier(self.fc, dtype))


@register(image_size=299)
def xception(num_classes: int = 1000, weights: str | os.PathLike[str] | None = None, dropout: float = 0.0) -> Xception:
    """Xception: 22,855,952 parameters and 8.36 G multiply-adds at 299 x 299 with the defaults.

    Args: as `Xception`. ``weights`` is a path or a URL of a .pth or .safetensors file with timm's keys, for example timm's
    own, converted from Keras' (79.06 % top-1):
    https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-cadene/xception-43020ad28.pth.

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`).
        OSError: weights that cannot be read.
    """
    model = Xception(num_classes, dropout)
    return model if weights is None else load_weights(model, weights)
