"""WideResNet for CIFAR (Zagoruyko & Komodakis 2016, arXiv 1605.07146), as pytorchcv builds it."""

from __future__ import annotations

import os
from collections import OrderedDict

import torch
from torch import Tensor, nn

from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn import FusedSequential, PreActBlock
from fastcnn.nn.folded import FoldedClassifier
from fastcnn.nn.sequential import fold_layers

WIDTHS = (16, 32, 64)


class CIFARWideResNet(nn.Module):
    """WideResNet of 6n + 4 layers for 32 x 32 images, with the state_dict keys of pytorchcv's CIFARWRN.

    Args:
        depth: 6n + 4: 28 in the paper's best.
        widen_factor: on the widths 16, 32 and 64 of the three stages.
        num_classes: outputs of the classifier.
        dropout: probability of zeroing a value between a block's convolutions, in training (the paper: 0 and 0.3).

    Shapes: x [N, 3, H, W], normalised RGB in NCHW or NHWC memory; returns logits [N, num_classes]. Dtypes: float32,
    bfloat16, float16, float64; autocast is respected.

    Raises:
        ValueError: a depth that is not 6n + 4, a dropout that is no probability.
        TypeError, ValueError: an input that is no [N, 3, H, W] float tensor.
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth: got {depth}, expected 6n + 4: 10, 16, 22, ...")
        channels = WIDTHS[0]
        layers = OrderedDict(init_block=nn.Conv2d(3, channels, 3, padding=1, bias=False))
        for i, width in enumerate(WIDTHS, 1):
            blocks = OrderedDict()
            for j in range(1, depth // 6 + 1):
                stride = 2 if i > 1 and j == 1 else 1
                blocks[f"unit{j}"] = PreActBlock(channels, width * widen_factor, stride, dropout=dropout)
                channels = width * widen_factor
            layers[f"stage{i}"] = nn.Sequential(blocks)
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
        features = fold_layers(self.features[:-1], dtype)
        return None if features is None else nn.Sequential(*features, FoldedClassifier(self.output, dtype))


@register(image_size=32)
def wrn28_10(
    num_classes: int = 10, weights: str | os.PathLike[str] | None = None, dropout: float = 0.0
) -> CIFARWideResNet:
    """WideResNet-28-10 for CIFAR: 36,479,194 parameters and 5.24 G multiply-adds at 32 x 32.

    Args: as `CIFARWideResNet`. ``weights`` is a path or a URL of a .pth or .safetensors file with pytorchcv's keys.

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`), a dropout that is no probability.
        OSError: weights that cannot be read.
    """
    model = CIFARWideResNet(28, 10, num_classes, dropout)
    return model if weights is None else load_weights(model, weights)
