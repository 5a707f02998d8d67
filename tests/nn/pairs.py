"""Every layer beside the stock module that it stands in for, with the same random weights: name -> (make, channels)."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torchvision
from torch import nn

from fastcnn.nn import (
    BasicBlock,
    Bottleneck,
    ConvBNAct,
    DepthwiseConv2d,
    FusedSequential,
    InvertedResidual,
    PreActBlock,
    SeparableConv2d,
)

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
}
