"""Every layer beside the stock module that it stands in for, with the same random weights: name -> (make, channels)."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fastcnn.models import inception_layers
from fastcnn.models.inception_resnet import ResidualInception
from fastcnn.nn import (
    BasicBlock,
    BasicConv2d,
    Bottleneck,
    ConvBNAct,
    DepthwiseConv2d,
    FusedSequential,
    InvertedResidual,
    PreActBlock,
    SeparableConv2d,
)
from fastcnn.nn.branches import BranchedModule, Fork
from tests.models import plain_inception as plain

resnet = torchvision.models.resnet
Pair = tuple[nn.Module, nn.Module]


def randomise(module: nn.Module) -> nn.Module:
    """Normalisations that do something: at torch's ones and zeros a gamma before another norm has no gradient."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.5)
    return module


def paired(ours: nn.Module, stock: nn.Module) -> Pair:
    """Both with the stock's weights; the keys are the same, or loading fails."""
    ours.load_state_dict(randomise(stock).state_dict())
    return ours, stock


def separable() -> Pair:
    plain = nn.Sequential(
        OrderedDict(
            depthwise=nn.Conv2d(20, 20, 3, 2, 1, groups=20, bias=False),
            mid_norm=nn.BatchNorm2d(20),
            act=nn.ReLU6(),
            pointwise=nn.Conv2d(20, 12, 1, bias=False),
            out_norm=nn.BatchNorm2d(12),
        )
    )
    options = {"mid_norm": nn.BatchNorm2d, "mid_act": "relu6", "out_norm": nn.BatchNorm2d}
    return paired(SeparableConv2d(20, 12, 3, 2, 1, **options), plain)


def inverted_residual(stride: int = 1, oup: int = 16) -> Pair:
    stock = torchvision.models.mobilenetv2.InvertedResidual(16, oup, stride, 6)
    return paired(InvertedResidual(16, oup, stride, 6), stock)


def depthwise() -> Pair:
    return paired(DepthwiseConv2d(16, 32, 5, 2, 2, groups=16), nn.Conv2d(16, 32, 5, 2, 2, groups=16))


def conv_bn_act() -> Pair:
    """With a bias, which batch statistics take away."""
    plain = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.Hardswish())
    return paired(ConvBNAct(16, 24, 3, 2, activation_layer=nn.Hardswish, bias=True), plain)


def bn_act_conv() -> Pair:
    plain = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 1))
    return paired(ConvBNAct(16, 24, 1, bias=True, order="bn_act_conv"), plain)


def downsample(inplanes: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def basic(stride: int = 1, planes: int = 16) -> Pair:
    down = [None if stride == 1 else downsample(16, planes, stride) for _ in range(2)]
    return paired(BasicBlock(16, planes, stride, down[0]), resnet.BasicBlock(16, planes, stride, down[1]))


def bottleneck(stride: int = 1, planes: int = 4, **options: int) -> Pair:
    down = [None if stride == 1 else downsample(16, 4 * planes, stride) for _ in range(2)]
    ours = Bottleneck(16, planes, stride, down[0], **options)
    return paired(ours, resnet.Bottleneck(16, planes, stride, down[1], **options))


def pre_act(stride: int = 1, channels: int = 16, bias: bool = False) -> Pair:
    preresnet = pytest.importorskip("pytorchcv.models.preresnet")
    stock = preresnet.PreResUnit(16, channels, stride, bias=bias, bottleneck=False)
    return paired(PreActBlock(16, channels, stride, bias), stock)


def sequential() -> Pair:
    def layers() -> list[nn.Module]:
        first = [nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 8, (1, 3), 1, (0, 1))]
        return [*first, nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.0), nn.Sigmoid()]

    return paired(FusedSequential(*layers()), nn.Sequential(*layers()))


def basic_conv() -> Pair:
    stock = torchvision.models.inception.BasicConv2d(16, 24, kernel_size=3, stride=2, padding=1)
    return paired(BasicConv2d(16, 24, 3, 2, 1), stock)


class _Forked(BranchedModule):
    def __init__(self) -> None:
        super().__init__()
        self.single, self.stem = inception_layers.conv(16, 8), inception_layers.chain(16, (12,), (8, 3))
        self.wide, self.tall = inception_layers.conv(8, 6, (1, 3)), inception_layers.conv(8, 10, (3, 1))
        self.average = inception_layers.average(16, 4)

    def branches(self) -> tuple:
        return self.single, (*self.stem, Fork((self.wide, (self.tall,)))), self.average


class _PlainForked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.single, self.stem = plain.unit(16, 8), plain.chain(16, (12,), (8, 3))
        self.wide, self.tall = plain.unit(8, 6, (1, 3)), plain.unit(8, 10, (3, 1))
        self.average = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), plain.unit(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        return torch.cat([self.single(x), self.wide(stem), self.tall(stem), self.average(x)], 1)


def residual_inception(scale: float = 0.17, act: str = "relu") -> Pair:
    ours = inception_layers.conv(16, 8), inception_layers.chain(16, (6,), (4, 3))
    stock = plain.unit(16, 8), plain.chain(16, (6,), (4, 3))
    return paired(
        ResidualInception(16, 12, scale, *ours, act=act), plain.Residual(16, 12, scale, act == "relu", *stock)
    )


PAIRS = {
    "depthwise": (depthwise, 16),
    "block": (inverted_residual, 16),
    "strided block": (lambda: inverted_residual(2, 24), 16),
    "separable": (separable, 20),
    "conv_bn_act": (conv_bn_act, 16),
    "bn_act_conv": (bn_act_conv, 16),
    "basic": (basic, 16),
    "strided basic": (lambda: basic(2, 24), 16),
    "bottleneck": (bottleneck, 16),
    "grouped bottleneck": (lambda: bottleneck(2, 8, groups=2, base_width=32), 16),
    "pre-activation": (pre_act, 16),
    "strided pre-activation": (lambda: pre_act(2, 24, bias=True), 16),
    "sequential": (sequential, 16),
    "basic convolution": (basic_conv, 16),
    "branches": (lambda: paired(_Forked(), _PlainForked()), 16),
    "residual inception": (residual_inception, 16),
    "last residual inception": (lambda: residual_inception(1.0, "none"), 16),
}
