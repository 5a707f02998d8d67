"""Inception networks that no package here has, in plain torch: the paper's GoogLeNet, Inception-ResNet-v1."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.googlenet import GoogLeNet, Inception, InceptionAux


class _Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, **options: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, **options)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class _Inception(Inception):
    def __init__(self, *widths: int) -> None:
        super().__init__(*widths, conv_block=_Conv)
        self.branch3[1] = _Conv(widths[4], widths[5], kernel_size=5, padding=2)


class PlainAux(InceptionAux):
    """Average pooling with windows of 5 x 5, not adaptive."""

    def __init__(self, channels: int, num_classes: int, dropout: float = 0.7) -> None:
        super().__init__(channels, num_classes, _Conv, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [N, num_classes]."""
        x = self.conv(F.avg_pool2d(x, 5, 3)).flatten(1)
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


class _Normalised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        squares = F.pad(x.square(), (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)
        return x / (1 + 1e-4 / 5 * squares) ** 0.75


def paper_googlenet(aux_logits: bool = True) -> nn.Module:
    """torchvision's with the paper's blocks, pooling and normalisation, and weights that let a signal through."""
    blocks = [_Conv, _Inception, PlainAux]
    model = GoogLeNet(aux_logits=aux_logits, init_weights=False, blocks=blocks)
    model.maxpool1 = nn.Sequential(model.maxpool1, _Normalised())
    model.maxpool2 = nn.Sequential(_Normalised(), model.maxpool2)
    model.maxpool4 = nn.MaxPool2d(3, 2, ceil_mode=True)
    model.auxiliary_weight = 0.3
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def unit(
    inputs: int, outputs: int, kernel: int | tuple = 1, stride: int = 1, padding: int | None = None
) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU; the size is kept at stride 1 and there is no padding at another."""
    if padding is None:
        r, s = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (r // 2, s // 2) if stride == 1 else 0
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs, eps=1e-3), relu=nn.ReLU()))


def chain(inputs: int, *specs: tuple) -> nn.Sequential:
    """One unit after another."""
    widths = (inputs, *(spec[0] for spec in specs))
    return nn.Sequential(*(unit(width, *spec) for width, spec in zip(widths, specs)))


class Cat(nn.Module):
    """Branches beside one another."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        for i, branch in enumerate(branches):
            self.add_module(f"branch{i}", branch)

    def forward(self, x: Tensor) -> Tensor:
        """Their outputs in one."""
        return torch.cat([branch(x) for name, branch in self.named_children() if name != "conv2d"], 1)


class Residual(Cat):
    """Branches, projected and scaled, plus the input."""

    def __init__(self, channels: int, merged: int, scale: float, relu: bool, *branches: nn.Module) -> None:
        super().__init__(*branches)
        self.conv2d, self.scale, self.relu = nn.Conv2d(merged, channels, 1), scale, relu

    def forward(self, x: Tensor) -> Tensor:
        """The sum, after a ReLU if there is one."""
        y = self.conv2d(super().forward(x)) * self.scale + x
        return F.relu(y) if self.relu else y


def _block35() -> nn.Module:
    branches = unit(256, 32), chain(256, (32,), (32, 3)), chain(256, (32,), (32, 3), (32, 3))
    return Residual(256, 96, 0.17, True, *branches)


def _block17() -> nn.Module:
    return Residual(896, 256, 0.1, True, unit(896, 128), chain(896, (128,), (128, (1, 7)), (128, (7, 1))))


def _block8(scale: float = 0.2, relu: bool = True) -> nn.Module:
    second = chain(1792, (192,), (192, (1, 3)), (192, (3, 1)))
    return Residual(1792, 384, scale, relu, unit(1792, 192), second)


def plain_inception_resnet_v1(facenet: bool = True, last_block: bool = True) -> nn.Module:
    """With facenet-pytorch's keys; without facenet's head and the last block it is the paper's."""
    second = chain(256, (192,), (192, 3), (256, 3, 2))
    model = nn.Sequential(
        OrderedDict(
            conv2d_1a=unit(3, 32, 3, 2), conv2d_2a=unit(32, 32, 3, 1, 0), conv2d_2b=unit(32, 64, 3),
            maxpool_3a=nn.MaxPool2d(3, 2), conv2d_3b=unit(64, 80), conv2d_4a=unit(80, 192, 3, 1, 0),
            conv2d_4b=unit(192, 256, 3, 2),
            repeat_1=nn.Sequential(*(_block35() for _ in range(5))),
            mixed_6a=Cat(unit(256, 384, 3, 2), second, nn.MaxPool2d(3, 2)),
            repeat_2=nn.Sequential(*(_block17() for _ in range(10))),
            mixed_7a=Cat(
                chain(896, (256,), (384, 3, 2)), chain(896, (256,), (256, 3, 2)),
                chain(896, (256,), (256, 3), (256, 3, 2)), nn.MaxPool2d(3, 2),
            ),
            repeat_3=nn.Sequential(*(_block8() for _ in range(5))),
        )
    )  # fmt: skip
    if last_block:
        model.add_module("block8", _block8(1.0, False))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    if facenet:
        model.add_module("last_linear", nn.Linear(1792, 512, bias=False))
        model.add_module("last_bn", nn.BatchNorm1d(512, eps=1e-3))
    model.add_module("logits", nn.Linear(512 if facenet else 1792, 1000))
    return model
