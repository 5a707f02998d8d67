"""Inception-v4 (Szegedy et al. 2016, arXiv 1602.07261), as timm builds it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.inception_layers import average, chain, conv
from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn import Branches, Dropout, MaxPool2d
from fastcnn.nn.branches import Branch, BranchedModule, Fork
from fastcnn.nn.folded import FoldedClassifier
from fastcnn.nn.sequential import fold_layers, run_layers

WIDE, TALL = (1, 7), (7, 1)


def _stem() -> list[nn.Module]:
    """299 x 299 pixels to 35 x 35 with 384 channels (figure 3)."""
    return [
        conv(3, 32, 3, 2),
        conv(32, 32, 3, padding=0),
        conv(32, 64, 3),
        Branches(maxpool=MaxPool2d(3, 2), conv=conv(64, 96, 3, 2)),
        Branches(
            branch0=chain(160, (64,), (96, 3, 1, 0)),
            branch1=chain(160, (64,), (64, WIDE), (64, TALL), (96, 3, 1, 0)),
        ),
        Branches(conv=conv(192, 192, 3, 2), maxpool=MaxPool2d(3, 2)),
    ]


def _inception_a() -> Branches:
    """Figure 4."""
    return Branches(
        branch0=conv(384, 96),
        branch1=chain(384, (64,), (96, 3)),
        branch2=chain(384, (64,), (96, 3), (96, 3)),
        branch3=average(384, 96),
    )


def _reduction_a() -> Branches:
    """Figure 7."""
    return Branches(
        branch0=conv(384, 384, 3, 2), branch1=chain(384, (192,), (224, 3), (256, 3, 2)), branch2=MaxPool2d(3, 2)
    )


def _inception_b() -> Branches:
    """Figure 5."""
    return Branches(
        branch0=conv(1024, 384),
        branch1=chain(1024, (192,), (224, WIDE), (256, TALL)),
        branch2=chain(1024, (192,), (192, TALL), (224, WIDE), (224, TALL), (256, WIDE)),
        branch3=average(1024, 128),
    )


def _reduction_b() -> Branches:
    """Figure 8."""
    return Branches(
        branch0=chain(1024, (192,), (192, 3, 2)),
        branch1=chain(1024, (256,), (256, WIDE), (320, TALL), (320, 3, 2)),
        branch2=MaxPool2d(3, 2),
    )


class InceptionC(BranchedModule):
    """Two of the branches end in a 1x3 and a 3x1 convolution side by side (figure 6); timm's keys."""

    def __init__(self) -> None:
        super().__init__()
        self.branch0 = conv(1536, 256)
        self.branch1_0 = conv(1536, 384)
        self.branch1_1a = conv(384, 256, (1, 3))
        self.branch1_1b = conv(384, 256, (3, 1))
        self.branch2_0 = conv(1536, 384)
        self.branch2_1 = conv(384, 448, (3, 1))
        self.branch2_2 = conv(448, 512, (1, 3))
        self.branch2_3a = conv(512, 256, (1, 3))
        self.branch2_3b = conv(512, 256, (3, 1))
        self.branch3 = average(1536, 256)

    def branches(self) -> Sequence[Branch]:
        """The four, two of which fork."""
        single = (self.branch1_0, Fork((self.branch1_1a, self.branch1_1b)))
        double = (self.branch2_0, self.branch2_1, self.branch2_2, Fork((self.branch2_3a, self.branch2_3b)))
        return self.branch0, single, double, self.branch3


class InceptionV4(nn.Module):
    """Inception-v4 with timm's state_dict keys; every branch is a fused chain.

    Args:
        num_classes: outputs of the classifier.
        dropout: probability of zeroing a feature before the classifier, in training (the paper: 0.2).

    Shapes: x [N, 3, H, W], RGB normalised to mean 0.5 and deviation 0.5, of at least 75 x 75 pixels in NCHW or NHWC memory
    (299 x 299 in the paper); returns logits [N, num_classes]. Dtypes: float32, bfloat16, float16, float64; autocast is
    respected.

    Raises:
        TypeError, ValueError: an input that is no [N, 3, H, W] float tensor, or below 75 pixels.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.0) -> None:
        super().__init__()
        inceptions = [*(_inception_a() for _ in range(4)), _reduction_a()]
        inceptions += [*(_inception_b() for _ in range(7)), _reduction_b(), *(InceptionC() for _ in range(3))]
        self.features = nn.Sequential(*_stem(), *inceptions)
        self.dropout = Dropout(dropout)
        self.last_linear = nn.Linear(1536, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = F.adaptive_avg_pool2d(run_layers(x, self.features), 1).flatten(1)
        return self.last_linear(self.dropout(x))

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize)."""
        features = fold_layers(self.features, dtype)
        return None if features is None else nn.Sequential(*features, FoldedClassifier(self.last_linear, dtype))


@register(image_size=299)
def inception_v4(
    num_classes: int = 1000, weights: str | os.PathLike[str] | None = None, dropout: float = 0.0
) -> InceptionV4:
    """Inception-v4: 42,679,816 parameters and 12.25 G multiply-adds at 299 x 299.

    Args: as `InceptionV4`. ``weights`` is a path or a URL of a .pth or .safetensors file with timm's keys, for example
    timm's own, converted from TensorFlow's (Apache-2.0, 80.14 % top-1):
    https://huggingface.co/timm/inception_v4.tf_in1k/resolve/main/model.safetensors.

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`).
        OSError: weights that cannot be read.
    """
    model = InceptionV4(num_classes, dropout)
    return model if weights is None else load_weights(model, weights)
