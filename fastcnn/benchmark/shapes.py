"""The layers that the benchmarks run: the separable ones of MobileNet-v2 at 224 and Xception at 299.

Written from the papers' tables; a test derives the same list from torchvision's and timm's models.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

# M x N x K of the pointwise layers of ResNet-50, a square product beside them.
PRODUCTS = (
    (25088, 64, 256),
    (25088, 256, 64),
    (6272, 512, 128),
    (1568, 1024, 256),
    (392, 2048, 512),
    (2048, 2048, 2048),
)


class Separable(NamedTuple):
    """A 3x3 depthwise and a 1x1 convolution, each of 1 image: the input is [channels, size, size]."""

    model: str
    channels: int
    out_channels: int
    size: int
    stride: int
    residual: bool

    @property
    def out_size(self) -> int:
        """Pixels along an axis of the output (padding 1)."""
        return (self.size - 1) // self.stride + 1

    @property
    def label(self) -> str:
        """How a table names it."""
        return (
            f"{self.model} {self.channels}→{self.out_channels} {self.size}²"
            f"{' s2' if self.stride == 2 else ''}{' +x' if self.residual else ''}"
        )


def _mobilenet_v2() -> list[Separable]:
    # Sandler et al. 2018, table 2: expansion, channels, repeats, stride.
    table = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    layers, channels, size = [], 32, 112
    for expansion, out, repeats, first_stride in table:
        for i in range(repeats):
            stride = first_stride if i == 0 else 1
            residual = stride == 1 and channels == out
            layer = Separable("mobilenet_v2", channels * expansion, out, size, stride, residual)
            layers.append(layer)
            channels, size = out, layer.out_size
    return layers


def _xception() -> list[Separable]:
    # Chollet 2017, figure 5: size, then the widths before, between and after a block's separable layers.
    blocks = [
        (147, (64, 128, 128)),
        (74, (128, 256, 256)),
        (37, (256, 728, 728)),
        *[(19, (728, 728, 728, 728))] * 8,
        (19, (728, 728, 1024)),
        (10, (1024, 1536, 2048)),
    ]
    return [
        Separable("xception", channels, out, size, 1, False)
        for size, widths in blocks
        for channels, out in zip(widths, widths[1:])
    ]


SEPARABLE = Counter(_mobilenet_v2() + _xception())


class Depthwise(NamedTuple):
    """A 3x3 depthwise convolution."""

    model: str
    channels: int
    size: int
    stride: int

    @property
    def groups(self) -> int:
        """One per channel."""
        return self.channels

    @property
    def out_size(self) -> int:
        """Pixels along an axis of the output (padding 1)."""
        return (self.size - 1) // self.stride + 1

    @property
    def label(self) -> str:
        """How a table names it."""
        return f"{self.model} {self.channels} {self.size}²{' s2' if self.stride == 2 else ''}"


DEPTHWISE: Counter[Depthwise] = Counter()
for _layer, _count in SEPARABLE.items():
    DEPTHWISE[Depthwise(_layer.model, _layer.channels, _layer.size, _layer.stride)] += _count


class Conv2d(NamedTuple):
    """A 3x3 convolution with padding 1 and as many channels in as out."""

    model: str
    channels: int
    size: int
    stride: int
    groups: int

    @property
    def out_size(self) -> int:
        """Pixels along an axis of the output."""
        return (self.size - 1) // self.stride + 1

    @property
    def label(self) -> str:
        """How a table names it."""
        return f"{self.model} {self.channels} {self.size}²{' s2' if self.stride == 2 else ''}"


def _bottlenecks(model: str, width: int, groups: int) -> list[Conv2d]:
    # He et al. 2016, table 1 (50 layers), with the stride in the 3x3 convolution; Xie et al. 2017, table 1.
    layers, size = [], 56
    for stage, repeats in enumerate((3, 4, 6, 3)):
        for i in range(repeats):
            stride = 2 if i == 0 and stage else 1
            layers.append(Conv2d(model, width << stage, size, stride, groups))
            size //= stride
    return layers


CONV2D = Counter(_bottlenecks("resnet50", 64, 1) + _bottlenecks("resnext50", 128, 32))
