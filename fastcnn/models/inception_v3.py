"""Inception-v3 (Szegedy et al. 2015, arXiv 1512.00567), as torchvision builds it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.inception_layers import InputTransform, conv, truncated_normal
from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn import AvgPool2d, Dropout, MaxPool2d
from fastcnn.nn.branches import Branch, BranchedModule, Fork
from fastcnn.nn.folded import FoldedClassifier
from fastcnn.nn.sequential import fold_layers, run_layers

WIDE, TALL = (1, 7), (7, 1)


class InceptionOutputs(NamedTuple):
    """What the model returns in training: scores [N, num_classes] of the classifier and of the auxiliary one."""

    logits: Tensor
    aux_logits: Tensor


class InceptionA(BranchedModule):
    """1x1, 5x5, two 3x3 convolutions and average pooling (figure 5 of the paper); torchvision's keys."""

    def __init__(self, in_channels: int, pool_features: int) -> None:
        super().__init__()
        self.branch1x1 = conv(in_channels, 64)
        self.branch5x5_1 = conv(in_channels, 48)
        self.branch5x5_2 = conv(48, 64, 5)
        self.branch3x3dbl_1 = conv(in_channels, 64)
        self.branch3x3dbl_2 = conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3)
        self.pool = AvgPool2d(3, 1, 1)
        self.branch_pool = conv(in_channels, pool_features)

    def branches(self) -> Sequence[Branch]:
        """The four."""
        double = (self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return self.branch1x1, (self.branch5x5_1, self.branch5x5_2), double, (self.pool, self.branch_pool)


class InceptionB(BranchedModule):
    """A reduction to half the size (figure 10); torchvision's keys."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = conv(in_channels, 384, 3, 2)
        self.branch3x3dbl_1 = conv(in_channels, 64)
        self.branch3x3dbl_2 = conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3, 2)
        self.pool = MaxPool2d(3, 2)

    def branches(self) -> Sequence[Branch]:
        """The three."""
        return self.branch3x3, (self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3), self.pool


class InceptionC(BranchedModule):
    """7x7 convolutions as 1x7 and 7x1 (figure 6); torchvision's keys."""

    def __init__(self, in_channels: int, channels_7x7: int) -> None:
        super().__init__()
        c7 = channels_7x7
        self.branch1x1 = conv(in_channels, 192)
        self.branch7x7_1 = conv(in_channels, c7)
        self.branch7x7_2 = conv(c7, c7, WIDE)
        self.branch7x7_3 = conv(c7, 192, TALL)
        self.branch7x7dbl_1 = conv(in_channels, c7)
        self.branch7x7dbl_2 = conv(c7, c7, TALL)
        self.branch7x7dbl_3 = conv(c7, c7, WIDE)
        self.branch7x7dbl_4 = conv(c7, c7, TALL)
        self.branch7x7dbl_5 = conv(c7, 192, WIDE)
        self.pool = AvgPool2d(3, 1, 1)
        self.branch_pool = conv(in_channels, 192)

    def branches(self) -> Sequence[Branch]:
        """The four."""
        double = tuple(getattr(self, f"branch7x7dbl_{i}") for i in range(1, 6))
        single = (self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        return self.branch1x1, single, double, (self.pool, self.branch_pool)


class InceptionD(BranchedModule):
    """A reduction to half the size; torchvision's keys."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = conv(in_channels, 192)
        self.branch3x3_2 = conv(192, 320, 3, 2)
        self.branch7x7x3_1 = conv(in_channels, 192)
        self.branch7x7x3_2 = conv(192, 192, WIDE)
        self.branch7x7x3_3 = conv(192, 192, TALL)
        self.branch7x7x3_4 = conv(192, 192, 3, 2)
        self.pool = MaxPool2d(3, 2)

    def branches(self) -> Sequence[Branch]:
        """The three."""
        seven = (self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4)
        return (self.branch3x3_1, self.branch3x3_2), seven, self.pool


class InceptionE(BranchedModule):
    """Two of the branches end in a 1x3 and a 3x1 convolution side by side (figure 7); torchvision's keys."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch1x1 = conv(in_channels, 320)
        self.branch3x3_1 = conv(in_channels, 384)
        self.branch3x3_2a = conv(384, 384, (1, 3))
        self.branch3x3_2b = conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = conv(in_channels, 448)
        self.branch3x3dbl_2 = conv(448, 384, 3)
        self.branch3x3dbl_3a = conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = conv(384, 384, (3, 1))
        self.pool = AvgPool2d(3, 1, 1)
        self.branch_pool = conv(in_channels, 192)

    def branches(self) -> Sequence[Branch]:
        """The four, two of which fork."""
        single = (self.branch3x3_1, Fork((self.branch3x3_2a, self.branch3x3_2b)))
        fork = Fork((self.branch3x3dbl_3a, self.branch3x3dbl_3b))
        double = (self.branch3x3dbl_1, self.branch3x3dbl_2, fork)
        return self.branch1x1, single, double, (self.pool, self.branch_pool)


class InceptionAux(nn.Module):
    """The auxiliary classifier: average pooling, a 1x1 and a 5x5 convolution, a linear layer; torchvision's keys."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.pool = AvgPool2d(5, 3)
        self.conv0 = conv(in_channels, 128)
        self.conv1 = conv(128, 768, 5, padding=0)
        self.fc = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [N, num_classes].

        Raises:
            ValueError: an x below 17 pixels.
        """
        if min(x.shape[2:]) < 17:
            raise ValueError(
                f"x: got shape {list(x.shape)}, expected 17 pixels or more along both axes for the aux logits"
            )
        x = run_layers(x, (self.pool, self.conv0, self.conv1))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class InceptionV3(nn.Module):
    """Inception-v3 with torchvision's state_dict keys; every branch is a fused chain.

    Average pooling counts the padding, as torchvision's; TensorFlow's does not.

    Args:
        num_classes: outputs of the classifiers.
        aux_logits: whether there is the auxiliary classifier, which only training uses.
        transform_input: takes images normalised to ImageNet's mean and deviation where the weights expect 0.5 and 0.5.
        dropout: probability of zeroing a feature before the classifier, in training.

    Shapes: x [N, 3, H, W], normalised RGB of at least 75 x 75 pixels in NCHW or NHWC memory (299 x 299 in the paper);
    returns logits [N, num_classes], in training mode with aux_logits `InceptionOutputs`. Dtypes: float32, bfloat16,
    float16, float64; autocast is respected.

    Raises:
        TypeError, ValueError: an input that is no [N, 3, H, W] float tensor, or below 75 pixels, in training with
            aux_logits below 299.
    """

    auxiliary_weight = 0.4

    def __init__(
        self, num_classes: int = 1000, aux_logits: bool = True, transform_input: bool = False, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.aux_logits, self.transform_input = aux_logits, transform_input
        self.transform = InputTransform() if transform_input else None
        self.Conv2d_1a_3x3 = conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = conv(32, 64, 3)
        self.maxpool1 = MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = conv(64, 80)
        self.Conv2d_4a_3x3 = conv(80, 192, 3, padding=0)
        self.maxpool2 = MaxPool2d(3, 2)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.AuxLogits = InceptionAux(768, num_classes) if aux_logits else None
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280)
        self.Mixed_7c = InceptionE(2048)
        self.dropout = Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes)
        aux = self.AuxLogits
        # As in torchvision, where the deviation of conv1 is the layer's and never reaches the convolution inside it.
        truncated_normal(self, {} if aux is None else {aux.fc: 0.001}, 0.1)

    def _stages(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The layers up to the auxiliary classifier, and after it."""
        stem = [self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3, self.maxpool1]
        stem += [self.Conv2d_3b_1x1, self.Conv2d_4a_3x3, self.maxpool2]
        if self.transform is not None:
            stem = [self.transform, *stem]
        mixed = [getattr(self, f"Mixed_{name}") for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e")]
        return stem + mixed, [self.Mixed_7a, self.Mixed_7b, self.Mixed_7c]

    def forward(self, x: Tensor) -> Tensor | InceptionOutputs:
        """Logits [N, num_classes]; in training mode with aux_logits those of both classifiers."""
        first, second = self._stages()
        auxiliary = self.training and self.AuxLogits is not None
        x = run_layers(x, first)
        aux = self.AuxLogits(x) if auxiliary else None
        x = run_layers(x, second)
        logits = self.fc(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return InceptionOutputs(logits, aux) if auxiliary else logits

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), without the auxiliary classifier."""
        first, second = self._stages()
        features = fold_layers(first + second, dtype)
        return None if features is None else nn.Sequential(*features, FoldedClassifier(self.fc, dtype))


@register(image_size=299)
def inception_v3(
    num_classes: int = 1000, weights: str | os.PathLike[str] | None = None, **options: object
) -> InceptionV3:
    """Inception-v3: 27,161,264 parameters, 3,326,696 of them the auxiliary classifier's, and 5.71 G multiply-adds at 299.

    Args: ``options`` as `InceptionV3`. ``weights`` is a path or a URL of a .pth or .safetensors file with torchvision's
    keys, for example torchvision's own (BSD-3-Clause, 77.29 % top-1), made with ``transform_input=True``:
    https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth.

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`).
        OSError: weights that cannot be read.
    """
    model = InceptionV3(num_classes, **options)
    return model if weights is None else load_weights(model, weights)
