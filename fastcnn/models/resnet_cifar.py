"""ResNet for CIFAR and its twin without shortcuts (He et al. 2015, arXiv 1512.03385, section 4.2), as pytorchcv's."""

from __future__ import annotations

import os
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn import FusedSequential
from fastcnn.nn.folded import FoldedClassifier
from fastcnn.nn.fused import FusedModule, Unit
from fastcnn.nn.residual import ResidualBlock
from fastcnn.nn.sequential import fold_layers
from fastcnn.ops.validation import check_choice

Source = str | os.PathLike[str] | None

SHORTCUTS = ("A", "B", "none")
WIDTHS = (16, 32, 64)


class SubsampleAndPad(nn.Module):
    """The shortcut without parameters: every ``stride``-th pixel along each axis, and channels of zeros after the input's.

    Shapes: [N, C, H, W] to [N, channels, P, Q].
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """The thinned and widened input."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels - x.shape[1]))


def conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int) -> OrderedDict[str, nn.Module]:
    """A convolution and its BatchNorm under pytorchcv's names."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels))


def _conv_bn_relu(in_channels: int, out_channels: int, stride: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(**conv_bn(in_channels, out_channels, 3, stride), activ=nn.ReLU(inplace=True))


def _body(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = nn.Sequential(_conv_bn_relu(in_channels, out_channels, stride))
    return nn.Sequential(OrderedDict(conv1=first, conv2=nn.Sequential(conv_bn(out_channels, out_channels, 3, 1))))


def _units(body: nn.Sequential) -> list[Unit]:
    return [Unit((layer.conv,), layer.bn, "relu") for layer in body]


class ResUnit(ResidualBlock):
    """BasicBlock with the keys of pytorchcv's ResUnit (``body.conv1.conv``, ``body.conv1.bn``, ..., ``identity_conv``).

    Args:
        in_channels, out_channels: channels in and out.
        stride: of the first convolution.
        shortcut: where the shape changes, "A": `SubsampleAndPad`, "B": a 1x1 convolution with BatchNorm.

    Shapes: x [N, in_channels, H, W] in NCHW or NHWC memory; the result [N, out_channels, P, Q] is channels_last.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.body = _body(in_channels, out_channels, stride)
        self.identity_conv: nn.Module | None = None
        if in_channels != out_channels or stride != 1:
            if shortcut == "B":
                self.identity_conv = nn.Sequential(conv_bn(in_channels, out_channels, 1, stride))
            else:
                self.identity_conv = SubsampleAndPad(out_channels, stride)

    def units(self) -> list[Unit]:
        """The two convolutions."""
        return _units(self.body)

    def shortcut(self) -> nn.Module | None:
        """The projection or the padding, where the shape changes."""
        return self.identity_conv


class PlainUnit(FusedModule):
    """A `ResUnit` without its shortcut; same keys.

    Shapes: x [N, in_channels, H, W] in NCHW or NHWC memory; the result [N, out_channels, P, Q] is channels_last.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = _body(in_channels, out_channels, stride)

    def units(self) -> list[Unit]:
        """The two convolutions."""
        return _units(self.body)


class CIFARResNet(nn.Module):
    """ResNet of 6n + 2 layers for 32 x 32 images, with the state_dict keys of pytorchcv's CIFARResNet.

    Args:
        depth: 6n + 2: 20, 32, 44, 56, 110 in the paper.
        num_classes: outputs of the classifier.
        shortcut: where the shape changes, "B": a 1x1 convolution with BatchNorm (pytorchcv's), "A": subsampling and zeros
            for the new channels (the paper's for CIFAR), after the others as in its authors' fb.resnet.torch; "none": no
            shortcut anywhere, the plain network.

    Shapes: x [N, 3, H, W], normalised RGB in NCHW or NHWC memory; returns logits [N, num_classes]. Dtypes: float32,
    bfloat16, float16, float64; autocast is respected.

    Raises:
        ValueError: a depth that is not 6n + 2, an unknown shortcut.
        TypeError, ValueError: an input that is no [N, 3, H, W] float tensor.
    """

    def __init__(self, depth: int, num_classes: int = 10, shortcut: str = "B") -> None:
        super().__init__()
        check_choice(shortcut, "shortcut", SHORTCUTS)
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth: got {depth}, expected 6n + 2: 8, 14, 20, ...")
        channels = WIDTHS[0]
        layers = OrderedDict(init_block=FusedSequential(_conv_bn_relu(3, channels, 1)))
        for i, width in enumerate(WIDTHS, 1):
            units = OrderedDict()
            for j in range(1, depth // 6 + 1):
                shape = (channels, width, 2 if i > 1 and j == 1 else 1)
                units[f"unit{j}"] = PlainUnit(*shape) if shortcut == "none" else ResUnit(*shape, shortcut)
                channels = width
            layers[f"stage{i}"] = nn.Sequential(units)
        layers["final_pool"] = nn.AdaptiveAvgPool2d(1)
        self.features = nn.Sequential(layers)
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


def _build(depth: int, num_classes: int, weights: Source, shortcut: str) -> CIFARResNet:
    model = CIFARResNet(depth, num_classes, shortcut)
    return model if weights is None else load_weights(model, weights)


@register(image_size=32)
def resnet20(num_classes: int = 10, weights: Source = None, shortcut: str = "B") -> CIFARResNet:
    """ResNet-20 for CIFAR: 272,474 parameters (option A: 269,722) and 0.041 G multiply-adds at 32 x 32.

    Args: as `CIFARResNet`. ``weights`` is a path or a URL of a .pth or .safetensors file with pytorchcv's keys.

    Raises:
        ValueError: an unknown shortcut, weights that do not fit (`fastcnn.models.weights.load_weights`).
        OSError: weights that cannot be read.
    """
    return _build(20, num_classes, weights, shortcut)


@register(image_size=32)
def resnet56(num_classes: int = 10, weights: Source = None, shortcut: str = "B") -> CIFARResNet:
    """ResNet-56 for CIFAR: 855,770 parameters (option A: 853,018) and 0.126 G multiply-adds at 32 x 32.

    Arguments and errors: `resnet20`.
    """
    return _build(56, num_classes, weights, shortcut)


@register(image_size=32)
def plain20(num_classes: int = 10, weights: Source = None) -> CIFARResNet:
    """ResNet-20 without shortcuts: 269,722 parameters. Arguments and errors: `resnet20`."""
    return _build(20, num_classes, weights, "none")


@register(image_size=32)
def plain56(num_classes: int = 10, weights: Source = None) -> CIFARResNet:
    """ResNet-56 without shortcuts, which trains worse than plain-20: 853,018 parameters.

    Arguments and errors: `resnet20`.
    """
    return _build(56, num_classes, weights, "none")
