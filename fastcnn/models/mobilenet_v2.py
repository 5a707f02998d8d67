"""MobileNet-v2 (Sandler et al. 2018, arXiv 1801.04381), as torchvision builds it."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn import ConvBNAct, Dropout, InvertedResidual
from fastcnn.nn.folded import FoldedClassifier

# Table 2 of the paper: expansion t, channels c, repetitions n, stride s of the first.
SETTING = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8 that is not more than a tenth below (the reference's rounding)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class MobileNetV2(nn.Module):
    """MobileNet-v2 with torchvision's state_dict keys; every block is one fused layer.

    Args:
        num_classes: outputs of the classifier.
        width_mult: factor on every width, rounded to multiples of 8.
        dropout: probability of zeroing a feature before the classifier, in training.

    Shapes: x [N, 3, H, W], normalised RGB in NCHW or NHWC memory (224 x 224 in the paper); returns logits
    [N, num_classes]. Dtypes: float32, bfloat16, float16, float64; autocast is respected.

    Raises:
        TypeError, ValueError: an input that is no [N, 3, H, W] float tensor.
    """

    def __init__(self, num_classes: int = 1000, width_mult: float = 1.0, dropout: float = 0.2) -> None:
        super().__init__()
        channels = _multiple_of_8(32 * width_mult)
        self.last_channel = _multiple_of_8(1280 * max(1.0, width_mult))
        features: list[nn.Module] = [ConvBNAct(3, channels, 3, 2, activation_layer=nn.ReLU6)]
        for t, c, n, s in SETTING:
            width = _multiple_of_8(c * width_mult)
            for i in range(n):
                features.append(InvertedResidual(channels, width, 1 if i else s, expand_ratio=t))
                channels = width
        features.append(ConvBNAct(channels, self.last_channel, 1, activation_layer=nn.ReLU6))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(Dropout(dropout), nn.Linear(self.last_channel, num_classes))
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = self.features(x)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize)."""
        features = [layer.folded(dtype) for layer in self.features]
        if None in features:
            return None
        return nn.Sequential(*features, FoldedClassifier(self.classifier[1], dtype))


@register()
def mobilenet_v2(
    num_classes: int = 1000,
    weights: str | os.PathLike[str] | None = None,
    width_mult: float = 1.0,
    dropout: float = 0.2,
) -> MobileNetV2:
    """MobileNet-v2: 3,504,872 parameters and 0.30 G multiply-adds at 224 x 224 with the defaults.

    Args: as `MobileNetV2`. ``weights`` is a path or a URL of a .pth or .safetensors file with torchvision's keys, for
    example torchvision's own (BSD-3-Clause): https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth (72.15 %
    top-1) or https://download.pytorch.org/models/mobilenet_v2-b0353104.pth (71.88 %).

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`).
        OSError: weights that cannot be read.
    """
    model = MobileNetV2(num_classes, width_mult, dropout)
    return model if weights is None else load_weights(model, weights)
