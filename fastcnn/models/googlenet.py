"""GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842), as torchvision builds it and as the paper does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.inception_layers import InputTransform, chain, conv, truncated_normal
from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn import AvgPool2d, Dropout, LocalResponseNorm, MaxPool2d
from fastcnn.nn.branches import Branch, BranchedModule
from fastcnn.nn.folded import FoldedClassifier
from fastcnn.nn.sequential import fold_layers, run_layers

# Table 1 of the paper: channels of the 1x1, of the 3x3's reduction and the 3x3, of the 5x5's and the 5x5, of the pool's.
WIDTHS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class GoogLeNetOutputs(NamedTuple):
    """What the model returns in training: scores [N, num_classes] of the classifier and of the auxiliary ones."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class Inception(BranchedModule):
    """1x1, 3x3, 5x5 convolution and max-pooling side by side; torchvision's keys.

    torchvision's third branch has a 3x3 convolution where the paper has a 5x5.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], paper: bool) -> None:
        super().__init__()
        ch1x1, reduce3, ch3x3, reduce5, ch5x5, pool_proj = widths
        norm = not paper
        self.branch1 = conv(in_channels, ch1x1, batch_norm=norm)
        self.branch2 = chain(in_channels, (reduce3, 1), (ch3x3, 3), batch_norm=norm)
        self.branch3 = chain(in_channels, (reduce5, 1), (ch5x5, 5 if paper else 3), batch_norm=norm)
        # torchvision's rounds up, which changes nothing at stride 1.
        self.branch4 = nn.Sequential(MaxPool2d(3, 1, 1), conv(in_channels, pool_proj, batch_norm=norm))

    def branches(self) -> Sequence[Branch]:
        """The four."""
        return self.branch1, self.branch2, self.branch3, self.branch4


class InceptionAux(nn.Module):
    """An auxiliary classifier: average pooling to 4 x 4, a 1x1 convolution and two linear layers; torchvision's keys."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float, paper: bool) -> None:
        super().__init__()
        # At 14 x 14 both give 4 x 4, over other windows.
        self.pool = AvgPool2d(5, 3) if paper else nn.AdaptiveAvgPool2d(4)
        self.conv = conv(in_channels, 128, batch_norm=not paper)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [N, num_classes].

        Raises:
            ValueError: an x that the paper's pooling does not make 4 x 4.
        """
        pooled = self.pool(x)
        if pooled.shape[2:] != (4, 4):
            raise ValueError(
                f"x: got shape {list(x.shape)}, expected 14 to 16 pixels along both axes for the aux logits"
            )
        return self.fc2(self.dropout(F.relu(self.fc1(self.conv(pooled).flatten(1)))))


class GoogLeNet(nn.Module):
    """GoogLeNet with torchvision's state_dict keys: BatchNorm in the convolutions, 3x3 ones in the 5x5 branch.

    Args:
        num_classes: outputs of the classifiers.
        aux_logits: whether there are the auxiliary classifiers, which only training uses.
        transform_input: takes images normalised to ImageNet's mean and deviation where the weights expect 0.5 and 0.5.
        dropout: probability of zeroing a feature before the classifier, in training; None: 0.2, the paper's 0.4.
        dropout_aux: the same after the auxiliary classifiers' first linear layer.
        paper: 5x5 convolutions in the 5x5 branch, biases in the place of BatchNorm, local response normalisation (Caffe's
            parameters: 5 channels, alpha 1e-4 over 5, beta 0.75, k 1), and the paper's pooling windows. The initialisation
            is then Caffe's too: without BatchNorm no signal passes torchvision's.

    Shapes: x [N, 3, H, W], normalised RGB of at least 15 x 15 pixels, with ``paper`` 31 x 31, in NCHW or NHWC memory
    (224 x 224 in the paper); returns logits [N, num_classes], in training mode with aux_logits `GoogLeNetOutputs`. Dtypes:
    float32, bfloat16, float16, float64; autocast is respected.

    Raises:
        TypeError, ValueError: an input that is no [N, 3, H, W] float tensor, or too small; in training the paper's
            aux_logits need 223 to 270 pixels along both axes.
    """

    auxiliary_weight = 0.3

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        dropout: float | None = None,
        dropout_aux: float = 0.7,
        paper: bool = False,
    ) -> None:
        super().__init__()
        self.aux_logits, self.transform_input = aux_logits, transform_input
        self.transform = InputTransform() if transform_input else None
        self.conv1 = conv(3, 64, 7, 2, 3, not paper)
        self.maxpool1 = MaxPool2d(3, 2, ceil_mode=True)
        self.lrn1 = LocalResponseNorm(5, 1e-4, 0.75, 1.0) if paper else None
        self.conv2 = conv(64, 64, batch_norm=not paper)
        self.conv3 = conv(64, 192, 3, batch_norm=not paper)
        self.lrn2 = LocalResponseNorm(5, 1e-4, 0.75, 1.0) if paper else None
        self.maxpool2 = MaxPool2d(3, 2, ceil_mode=True)
        self.maxpool3 = MaxPool2d(3, 2, ceil_mode=True)
        self.maxpool4 = MaxPool2d(3 if paper else 2, 2, ceil_mode=True)
        channels = 192
        for name, widths in WIDTHS.items():
            self.add_module(f"inception{name}", Inception(channels, widths, paper))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.aux1 = InceptionAux(512, num_classes, dropout_aux, paper) if aux_logits else None
        self.aux2 = InceptionAux(528, num_classes, dropout_aux, paper) if aux_logits else None
        self.dropout = Dropout((0.4 if paper else 0.2) if dropout is None else dropout)
        self.fc = nn.Linear(1024, num_classes)
        if paper:
            self._initialize_as_caffe()
        else:
            truncated_normal(self, {}, 0.01)

    def _initialize_as_caffe(self) -> None:
        classifiers = (self.fc, *(aux.fc2 for aux in (self.aux1, self.aux2) if aux is not None))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")  # Caffe's "xavier"
                nn.init.constant_(module.bias, 0.0 if module in classifiers else 0.2)

    def _inceptions(self, names: str) -> list[nn.Module]:
        return [getattr(self, f"inception{name}") for name in names.split()]

    def _stages(self) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
        """The layers up to the first auxiliary classifier, up to the second, and after it."""
        stem = (self.transform, self.conv1, self.maxpool1, self.lrn1, self.conv2, self.conv3, self.lrn2, self.maxpool2)
        first = [layer for layer in stem if layer is not None]
        first += [*self._inceptions("3a 3b"), self.maxpool3, self.inception4a]
        return first, self._inceptions("4b 4c 4d"), [self.inception4e, self.maxpool4, *self._inceptions("5a 5b")]

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        """Logits [N, num_classes]; in training mode with aux_logits those of all three classifiers."""
        first, second, third = self._stages()
        auxiliary = self.training and self.aux1 is not None
        x = run_layers(x, first)
        aux1 = self.aux1(x) if auxiliary else None
        x = run_layers(x, second)
        aux2 = self.aux2(x) if auxiliary else None
        x = run_layers(x, third)
        logits = self.fc(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return GoogLeNetOutputs(logits, aux2, aux1) if auxiliary else logits

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), without the auxiliary classifiers."""
        first, second, third = self._stages()
        features = fold_layers([*first, *second, *third], dtype)
        return None if features is None else nn.Sequential(*features, FoldedClassifier(self.fc, dtype))


@register()
def googlenet(num_classes: int = 1000, weights: str | os.PathLike[str] | None = None, **options: object) -> GoogLeNet:
    """GoogLeNet: 13,004,888 parameters, 6,379,984 of them the auxiliary classifiers', and 1.50 G multiply-adds at 224.

    With ``paper=True`` 13,378,280 and 1.58 G. Args: ``options`` as `GoogLeNet`. ``weights`` is a path or a URL of a .pth or
    .safetensors file with torchvision's keys, for example torchvision's own (BSD-3-Clause, 69.78 % top-1), made with
    ``transform_input=True``: https://download.pytorch.org/models/googlenet-1378be20.pth.

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`).
        OSError: weights that cannot be read.
    """
    model = GoogLeNet(num_classes, **options)
    return model if weights is None else load_weights(model, weights)
