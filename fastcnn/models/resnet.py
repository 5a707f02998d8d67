"""ResNet (He et al. 2015, arXiv 1512.03385), ResNeXt and WideResNet-50-2, as torchvision builds them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn import BasicBlock, Bottleneck, MaxPool2d
from fastcnn.nn.folded import FoldedClassifier
from fastcnn.nn.sequential import fold_layers, run_layers

Source = str | os.PathLike[str] | None


class ResNet(nn.Module):
    """ResNet with torchvision's state_dict keys and arguments; every block is one fused chain and its shortcut another.

    The stride of a bottleneck is its 3x3 convolution's ("v1.5"), as in torchvision; the paper's is the first 1x1's.

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks in each of the four stages.
        num_classes: outputs of the classifier.
        zero_init_residual: every block's last BatchNorm starts at zero, so that the block starts as its shortcut
            (arXiv 1706.02677, section 5.1).
        groups, width_per_group: groups of the 3x3 convolutions and their channels at 64 planes: ResNeXt, WideResNet.
        replace_stride_with_dilation: for stages 2 to 4, whether dilation takes the place of the stride.
        norm_layer: makes an nn.BatchNorm2d of a number of channels.

    Shapes: x [N, 3, H, W], normalised RGB in NCHW or NHWC memory (224 x 224 in the paper); returns logits
    [N, num_classes]. Dtypes: float32, bfloat16, float16, float64; autocast is respected.

    Raises:
        TypeError, ValueError: an input that is no [N, 3, H, W] float tensor, or options that the block lacks.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[[int], nn.BatchNorm2d] | None = None,
    ) -> None:
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation: got {dilate!r}, expected None or three booleans")
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self._block, self._groups, self._base_width = block, groups, width_per_group
        self._channels, self._dilation = 64, 1
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = self._norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(64, layers[0], 1, False)
        self.layer2 = self._stage(128, layers[1], 2, dilate[0])
        self.layer3 = self._stage(256, layers[2], 2, dilate[1])
        self.layer4 = self._stage(512, layers[3], 2, dilate[2])
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialize(zero_init_residual)

    def _stage(self, planes: int, blocks: int, stride: int, dilate: bool) -> nn.Sequential:
        outputs, dilation, norm_layer = planes * self._block.expansion, self._dilation, self._norm_layer
        if dilate:
            self._dilation, stride = self._dilation * stride, 1
        downsample = None
        if stride != 1 or self._channels != outputs:
            conv = nn.Conv2d(self._channels, outputs, 1, stride, bias=False)
            downsample = nn.Sequential(conv, norm_layer(outputs))
        options = {"groups": self._groups, "base_width": self._base_width, "norm_layer": norm_layer}
        stage = [self._block(self._channels, planes, stride, downsample, dilation=dilation, **options)]
        self._channels = outputs
        stage += [self._block(outputs, planes, dilation=self._dilation, **options) for _ in range(1, blocks)]
        return nn.Sequential(*stage)

    def _initialize(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                if last.weight is not None:
                    nn.init.zeros_(last.weight)

    def _layers(self) -> tuple[nn.Module, ...]:
        stem = (self.conv1, self.bn1, self.relu, self.maxpool)
        return *stem, self.layer1, self.layer2, self.layer3, self.layer4

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = run_layers(x, self._layers())
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize)."""
        features = fold_layers(self._layers(), dtype)
        return None if features is None else nn.Sequential(*features, FoldedClassifier(self.fc, dtype))


def _build(
    block: type[BasicBlock] | type[Bottleneck], layers: Sequence[int], num_classes: int, weights: Source, **options
) -> ResNet:
    model = ResNet(block, layers, num_classes, **options)
    return model if weights is None else load_weights(model, weights)


@register()
def resnet18(num_classes: int = 1000, weights: Source = None, **options: object) -> ResNet:
    """ResNet-18: 11,689,512 parameters and 1.81 G multiply-adds at 224 x 224.

    Args: ``options`` as `ResNet`. ``weights`` is a path or a URL of a .pth or .safetensors file with torchvision's keys,
    for example torchvision's own (BSD-3-Clause, 69.76 % top-1):
    https://download.pytorch.org/models/resnet18-f37072fd.pth.

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`).
        OSError: weights that cannot be read.
    """
    return _build(BasicBlock, (2, 2, 2, 2), num_classes, weights, **options)


@register()
def resnet34(num_classes: int = 1000, weights: Source = None, **options: object) -> ResNet:
    """ResNet-34: 21,797,672 parameters and 3.66 G multiply-adds at 224 x 224. Arguments and errors: `resnet18`.

    torchvision's weights (73.31 % top-1): https://download.pytorch.org/models/resnet34-b627a593.pth.
    """
    return _build(BasicBlock, (3, 4, 6, 3), num_classes, weights, **options)


@register()
def resnet50(num_classes: int = 1000, weights: Source = None, **options: object) -> ResNet:
    """ResNet-50: 25,557,032 parameters and 4.09 G multiply-adds at 224 x 224. Arguments and errors: `resnet18`.

    torchvision's weights (76.13 % and 80.86 % top-1): https://download.pytorch.org/models/resnet50-0676ba61.pth and
    https://download.pytorch.org/models/resnet50-11ad3fa6.pth.
    """
    return _build(Bottleneck, (3, 4, 6, 3), num_classes, weights, **options)


@register()
def resnet101(num_classes: int = 1000, weights: Source = None, **options: object) -> ResNet:
    """ResNet-101: 44,549,160 parameters and 7.80 G multiply-adds at 224 x 224. Arguments and errors: `resnet18`.

    torchvision's weights (77.37 % and 81.89 % top-1): https://download.pytorch.org/models/resnet101-63fe2227.pth and
    https://download.pytorch.org/models/resnet101-cd907fc2.pth.
    """
    return _build(Bottleneck, (3, 4, 23, 3), num_classes, weights, **options)


@register()
def resnet152(num_classes: int = 1000, weights: Source = None, **options: object) -> ResNet:
    """ResNet-152: 60,192,808 parameters and 11.51 G multiply-adds at 224 x 224. Arguments and errors: `resnet18`.

    torchvision's weights (78.31 % and 82.28 % top-1): https://download.pytorch.org/models/resnet152-394f9c45.pth and
    https://download.pytorch.org/models/resnet152-f82ba261.pth.
    """
    return _build(Bottleneck, (3, 8, 36, 3), num_classes, weights, **options)


@register()
def wide_resnet50_2(num_classes: int = 1000, weights: Source = None, **options: object) -> ResNet:
    """WideResNet-50-2 (arXiv 1605.07146): 68,883,240 parameters and 11.40 G multiply-adds at 224 x 224.

    ResNet-50 with inner 3x3 convolutions of twice the channels. Arguments and errors: `resnet18`. torchvision's weights
    (78.47 % and 81.60 % top-1): https://download.pytorch.org/models/wide_resnet50_2-95faca4d.pth and
    https://download.pytorch.org/models/wide_resnet50_2-9ba9bcbe.pth.
    """
    return _build(Bottleneck, (3, 4, 6, 3), num_classes, weights, **{"width_per_group": 128, **options})


@register()
def resnext50_32x4d(num_classes: int = 1000, weights: Source = None, **options: object) -> ResNet:
    """ResNeXt-50 32x4d (arXiv 1611.05431, table 1): 25,028,904 parameters and 4.23 G multiply-adds at 224 x 224.

    Arguments and errors: `resnet18`. torchvision's weights (77.62 % and 81.20 % top-1):
    https://download.pytorch.org/models/resnext50_32x4d-7cdf4587.pth and
    https://download.pytorch.org/models/resnext50_32x4d-1a0047aa.pth.
    """
    return _build(Bottleneck, (3, 4, 6, 3), num_classes, weights, **{"groups": 32, "width_per_group": 4, **options})


@register()
def resnext101_32x8d(num_classes: int = 1000, weights: Source = None, **options: object) -> ResNet:
    """ResNeXt-101 32x8d: 88,791,336 parameters and 16.41 G multiply-adds at 224 x 224.

    A configuration of torchvision's, not of the paper's. Arguments and errors: `resnet18`. torchvision's weights
    (79.31 % and 82.83 % top-1): https://download.pytorch.org/models/resnext101_32x8d-8ba56ff5.pth and
    https://download.pytorch.org/models/resnext101_32x8d-110c445d.pth.
    """
    return _build(Bottleneck, (3, 4, 23, 3), num_classes, weights, **{"groups": 32, "width_per_group": 8, **options})
