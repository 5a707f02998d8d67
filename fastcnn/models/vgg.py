"""VGG (Simonyan & Zisserman 2014, arXiv 1409.1556), with and without BatchNorm, as torchvision builds it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor, nn

from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn import Dropout, FusedSequential, MaxPool2d

Source = str | os.PathLike[str] | None

# Table 1 of the paper: convolutions in each of the five stages of these widths.
WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = {"A": (1, 1, 2, 2, 2), "B": (2, 2, 2, 2, 2), "D": (2, 2, 3, 3, 3), "E": (2, 2, 4, 4, 4)}


def _features(depths: Sequence[int], batch_norm: bool) -> FusedSequential:
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in zip(WIDTHS, depths):
        for _ in range(depth):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)] if batch_norm else [nn.ReLU(inplace=True)]
            channels = width
        layers.append(MaxPool2d(2, 2))
    return FusedSequential(*layers)


class VGG(nn.Module):
    """VGG with torchvision's state_dict keys; the convolutions between two poolings are one fused chain.

    Args:
        depths: convolutions in each of the five stages (`DEPTHS`).
        batch_norm: a BatchNorm after every convolution, which keeps its bias, as in torchvision.
        num_classes: outputs of the classifier.
        dropout: probability of zeroing a value after the first and the second linear layer's ReLU, in training.

    Shapes: x [N, 3, H, W], normalised RGB of at least 32 x 32 pixels in NCHW or NHWC memory (224 x 224 in the paper);
    returns logits [N, num_classes]. Dtypes: float32, bfloat16, float16, float64; autocast is respected.

    Raises:
        TypeError, ValueError: an input that is no [N, 3, H, W] float tensor.
    """

    def __init__(
        self, depths: Sequence[int], batch_norm: bool = False, num_classes: int = 1000, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.features = _features(depths, batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _build(name: str, batch_norm: bool, num_classes: int, weights: Source, dropout: float) -> VGG:
    model = VGG(DEPTHS[name], batch_norm, num_classes, dropout)
    return model if weights is None else load_weights(model, weights)


@register()
def vgg11(num_classes: int = 1000, weights: Source = None, dropout: float = 0.5) -> VGG:
    """VGG-11 (A): 132,863,336 parameters and 7.61 G multiply-adds at 224 x 224.

    Args: as `VGG`. ``weights`` is a path or a URL of a .pth or .safetensors file with torchvision's keys, for example
    torchvision's own (BSD-3-Clause, 69.02 % top-1): https://download.pytorch.org/models/vgg11-8a719046.pth.

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`).
        OSError: weights that cannot be read.
    """
    return _build("A", False, num_classes, weights, dropout)


@register()
def vgg11_bn(num_classes: int = 1000, weights: Source = None, dropout: float = 0.5) -> VGG:
    """VGG-11 with BatchNorm: 132,868,840 parameters. Arguments and errors: `vgg11`.

    torchvision's weights (70.37 % top-1): https://download.pytorch.org/models/vgg11_bn-6002323d.pth.
    """
    return _build("A", True, num_classes, weights, dropout)


@register()
def vgg13(num_classes: int = 1000, weights: Source = None, dropout: float = 0.5) -> VGG:
    """VGG-13 (B): 133,047,848 parameters and 11.31 G multiply-adds at 224 x 224. Arguments and errors: `vgg11`.

    torchvision's weights (69.93 % top-1): https://download.pytorch.org/models/vgg13-19584684.pth.
    """
    return _build("B", False, num_classes, weights, dropout)


@register()
def vgg13_bn(num_classes: int = 1000, weights: Source = None, dropout: float = 0.5) -> VGG:
    """VGG-13 with BatchNorm: 133,053,736 parameters. Arguments and errors: `vgg11`.

    torchvision's weights (71.59 % top-1): https://download.pytorch.org/models/vgg13_bn-abd245e5.pth.
    """
    return _build("B", True, num_classes, weights, dropout)


@register()
def vgg16(num_classes: int = 1000, weights: Source = None, dropout: float = 0.5) -> VGG:
    """VGG-16 (D): 138,357,544 parameters and 15.47 G multiply-adds at 224 x 224. Arguments and errors: `vgg11`.

    torchvision's weights (71.59 % top-1): https://download.pytorch.org/models/vgg16-397923af.pth.
    """
    return _build("D", False, num_classes, weights, dropout)


@register()
def vgg16_bn(num_classes: int = 1000, weights: Source = None, dropout: float = 0.5) -> VGG:
    """VGG-16 with BatchNorm: 138,365,992 parameters. Arguments and errors: `vgg11`.

    torchvision's weights (73.36 % top-1): https://download.pytorch.org/models/vgg16_bn-6c64b313.pth.
    """
    return _build("D", True, num_classes, weights, dropout)


@register()
def vgg19(num_classes: int = 1000, weights: Source = None, dropout: float = 0.5) -> VGG:
    """VGG-19 (E): 143,667,240 parameters and 19.63 G multiply-adds at 224 x 224. Arguments and errors: `vgg11`.

    torchvision's weights (72.38 % top-1): https://download.pytorch.org/models/vgg19-dcbb9e9d.pth.
    """
    return _build("E", False, num_classes, weights, dropout)


@register()
def vgg19_bn(num_classes: int = 1000, weights: Source = None, dropout: float = 0.5) -> VGG:
    """VGG-19 with BatchNorm: 143,678,248 parameters. Arguments and errors: `vgg11`.

    torchvision's weights (74.22 % top-1): https://download.pytorch.org/models/vgg19_bn-c79401a0.pth.
    """
    return _build("E", True, num_classes, weights, dropout)
