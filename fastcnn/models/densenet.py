"""DenseNet (Huang et al. 2016, arXiv 1608.06993): for ImageNet as torchvision builds it."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn import DenseBlock, MaxPool2d, Transition
from fastcnn.nn.folded import FoldedClassifier
from fastcnn.nn.sequential import fold_layers, run_layers

Source = str | os.PathLike[str] | None

# torchvision's published files call a layer's parts norm.1, conv.1, norm.2 and conv.2.
_DOTTED = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)$")


class DenseNet(nn.Module):
    """DenseNet-BC with torchvision's state_dict keys and arguments; every block is one buffer.

    Args:
        growth_rate: channels that a layer adds.
        block_config: layers of each block.
        num_init_features: channels of the stem.
        bn_size: a layer's 1x1 convolution makes bn_size * growth_rate channels.
        drop_rate: probability of dropout after every layer, in training (the paper: 0.2 without augmentation).
        num_classes: outputs of the classifier.
        memory_efficient: whether backward computes the 1x1 outputs again instead of keeping them.

    Shapes: x [N, 3, H, W], normalised RGB in NCHW or NHWC memory (224 x 224 in the paper); returns logits
    [N, num_classes]. Dtypes: float32, bfloat16, float16, float64; autocast is respected.

    Raises:
        TypeError, ValueError: an input that is no [N, 3, H, W] float tensor.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        features = OrderedDict(
            conv0=nn.Conv2d(3, num_init_features, 7, 2, 3, bias=False),
            norm0=nn.BatchNorm2d(num_init_features),
            relu0=nn.ReLU(inplace=True),
            pool0=MaxPool2d(3, 2, 1),
        )
        channels = num_init_features
        for i, layers in enumerate(block_config, 1):
            if i > 1:
                features[f"transition{i - 1}"] = Transition(channels, channels // 2)
                channels //= 2
            features[f"denseblock{i}"] = DenseBlock(layers, channels, bn_size, growth_rate, drop_rate, memory_efficient)
            channels += layers * growth_rate
        features["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(features)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def _layers(self) -> tuple[nn.Module, ...]:
        return *self.features, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = run_layers(x, self._layers())
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize)."""
        features = fold_layers(self._layers(), dtype)
        return None if features is None else nn.Sequential(*features, FoldedClassifier(self.classifier, dtype))


def _build(
    growth_rate: int, config: Sequence[int], stem: int, num_classes: int, weights: Source, **options
) -> DenseNet:
    model = DenseNet(growth_rate, config, stem, num_classes=num_classes, **options)
    return model if weights is None else load_weights(model, weights, partial(_DOTTED.sub, r"\1\2"))


@register()
def densenet121(num_classes: int = 1000, weights: Source = None, **options: object) -> DenseNet:
    """DenseNet-121: 7,978,856 parameters and 2.83 G multiply-adds at 224 x 224.

    Args: ``weights`` is a path or a URL of a .pth or .safetensors file with torchvision's keys (its published files too);
    ``options`` are `DenseNet`'s: drop_rate, memory_efficient, bn_size.

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`).
        OSError: weights that cannot be read.
    """
    return _build(32, (6, 12, 24, 16), 64, num_classes, weights, **options)


@register()
def densenet161(num_classes: int = 1000, weights: Source = None, **options: object) -> DenseNet:
    """DenseNet-161, of growth rate 48: 28,681,000 parameters and 7.73 G multiply-adds; as `densenet121`."""
    return _build(48, (6, 12, 36, 24), 96, num_classes, weights, **options)


@register()
def densenet169(num_classes: int = 1000, weights: Source = None, **options: object) -> DenseNet:
    """DenseNet-169: 14,149,480 parameters and 3.36 G multiply-adds; as `densenet121`."""
    return _build(32, (6, 12, 32, 32), 64, num_classes, weights, **options)


@register()
def densenet201(num_classes: int = 1000, weights: Source = None, **options: object) -> DenseNet:
    """DenseNet-201: 20,013,928 parameters and 4.29 G multiply-adds; as `densenet121`."""
    return _build(32, (6, 12, 48, 32), 64, num_classes, weights, **options)


@register()
def densenet264(num_classes: int = 1000, weights: Source = None, **options: object) -> DenseNet:
    """DenseNet-264 of the paper's table 1: 33,337,704 parameters and 5.75 G multiply-adds; as `densenet121`."""
    return _build(32, (6, 12, 64, 48), 64, num_classes, weights, **options)
