"""Every model's reference implementation, its parameters, and an image size for tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
import torchvision
from pytorchcv.model_provider import get_model
from pytorchcv.models.resnet import ResUnit
from pytorchcv.models.wrn_cifar import get_wrn_cifar
from torch import Tensor, nn

from fastcnn.benchmark.plain import PlainCapsNet, PlainLeNet5
from fastcnn.models import CIFARWideResNet, create_model
from tests.models.plain_inception import paper_googlenet, plain_inception_resnet_v1


class Reference(NamedTuple):
    """ours() and stock() make the same model; size and channels are of the images that tests give it."""

    ours: Callable[[], nn.Module]
    stock: Callable[[], nn.Module]
    parameters: int
    size: int
    channels: int = 3


class _Padded(nn.Module):
    """Option A: every second pixel, and the missing channels as zeros after the others."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, ::2, ::2]
        return torch.cat([x, torch.zeros_like(x)], 1)


class _Plain(ResUnit):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x))


def cifar_resnet(depth: int, shortcut: str) -> nn.Module:
    """pytorchcv's ResNet, whose shortcuts are option B, with others or none."""
    model = get_model(f"resnet{depth}_cifar10")
    for unit in model.modules():
        if not isinstance(unit, ResUnit):
            continue
        if shortcut == "A" and unit.resize_identity:
            unit.identity_conv = _Padded()
        elif shortcut == "none":
            unit.__class__ = _Plain
            if unit.resize_identity:
                del unit.identity_conv
    return model


def _torchvision(name: str, parameters: int, size: int = 64) -> Reference:
    return Reference(partial(create_model, name), getattr(torchvision.models, name), parameters, size)


def _with_auxiliaries(name: str, weight: float, aux_logits: bool) -> nn.Module:
    """torchvision's, which leaves the auxiliaries' weight to who trains it."""
    model = getattr(torchvision.models, name)(aux_logits=aux_logits, init_weights=True)
    model.auxiliary_weight = weight
    return model


def _inception(name: str, weight: float, parameters: int, size: int, aux_logits: bool = True) -> Reference:
    ours = partial(create_model, name, aux_logits=aux_logits)
    return Reference(ours, partial(_with_auxiliaries, name, weight, aux_logits), parameters, size)


def _timm(name: str, parameters: int, size: int) -> Reference:
    return Reference(partial(create_model, name), partial(timm.create_model, name), parameters, size)


def _cifar(name: str, depth: int, shortcut: str, parameters: int) -> Reference:
    options = {} if shortcut == "none" else {"shortcut": shortcut}
    return Reference(partial(create_model, name, **options), partial(cifar_resnet, depth, shortcut), parameters, 32)


def _small_classifier(make: Callable[[], nn.Module]) -> nn.Module:
    model = make()
    model.classifier = nn.Linear(512 * 7 * 7, 10)
    return model


def _vgg_features(name: str, parameters: int) -> Reference:
    """VGG without 120 million of its parameters, in linear layers that are torch's in both."""
    makers = (partial(create_model, name), getattr(torchvision.models, name))
    return Reference(*(partial(_small_classifier, make) for make in makers), parameters, 32)


def _densenet_bc(depth: int, growth_rate: int, parameters: int) -> Reference:
    return Reference(
        partial(create_model, f"densenet_bc{depth}_{growth_rate}"),
        partial(get_model, f"densenet{depth}_k{growth_rate}_bc_cifar10"), parameters, 32,
    )  # fmt: skip


# Those that go through everything, on small images.
LIGHT = {
    "mobilenet_v2": _torchvision("mobilenet_v2", 3_504_872, 96),
    "xception": Reference(
        partial(create_model, "xception"), partial(timm.create_model, "legacy_xception"), 22_855_952, 107
    ),
    "resnet18": _torchvision("resnet18", 11_689_512),
    "resnet50": _torchvision("resnet50", 25_557_032),
    "resnext50_32x4d": _torchvision("resnext50_32x4d", 25_028_904),
    "googlenet": _inception("googlenet", 0.3, 13_004_888, 64),
    "googlenet of the paper without aux": Reference(
        partial(create_model, "googlenet", paper=True, aux_logits=False), partial(paper_googlenet, False), 6_998_552, 64
    ),
    "inception_v3 without aux": _inception("inception_v3", 0.4, 23_834_568, 107, False),
    "inception_resnet_v1": Reference(
        partial(create_model, "inception_resnet_v1"), plain_inception_resnet_v1, 23_995_624, 107
    ),
    "vgg11 features": _vgg_features("vgg11", 9_220_480 + 250_890),
    "vgg13_bn features": _vgg_features("vgg13_bn", 9_410_880 + 250_890),
    "resnet20": _cifar("resnet20", 20, "B", 272_474),
    "resnet20 option A": _cifar("resnet20", 20, "A", 269_722),
    "resnet56": _cifar("resnet56", 56, "B", 855_770),
    "plain20": _cifar("plain20", 20, "none", 269_722),
    "wrn16_2": Reference(
        partial(CIFARWideResNet, 16, 2), partial(get_wrn_cifar, num_classes=10, blocks=16, width_factor=2), 691_674, 32
    ),
    "densenet121": _torchvision("densenet121", 7_978_856),
    "densenet_bc40_12": _densenet_bc(40, 12, 176_122),
    "lenet5": Reference(partial(create_model, "lenet5"), PlainLeNet5, 61_706, 32, 1),
    "lenet5 with relu and max": Reference(
        partial(create_model, "lenet5", image_size=28, activation="relu", pool="max"),
        partial(PlainLeNet5, 28, torch.relu, F.max_pool2d), 61_706, 28, 1,
    ),
    "capsnet": Reference(partial(create_model, "capsnet"), PlainCapsNet, 8_215_728, 28, 1),
    "capsnet of the paper": Reference(
        partial(create_model, "capsnet", image_size=20, prime_scale=1.0, bias=False),
        partial(PlainCapsNet, 20, prime_scale=1.0, bias=False), 6_511_248, 20, 1,
    ),
    "capsnet_cifar": Reference(
        partial(create_model, "capsnet_cifar", image_size=12),
        partial(PlainCapsNet, 12, 3, types=64, prime_scale=1 / 64, same=True), 13_629_088, 12,
    ),
}  # fmt: skip
# Those whose counts and keys are compared, and in slow tests their outputs.
HEAVY = {
    "resnet34": _torchvision("resnet34", 21_797_672),
    "resnet101": _torchvision("resnet101", 44_549_160),
    "resnet152": _torchvision("resnet152", 60_192_808),
    "wide_resnet50_2": _torchvision("wide_resnet50_2", 68_883_240),
    "resnext101_32x8d": _torchvision("resnext101_32x8d", 88_791_336),
    "googlenet of the paper": Reference(
        partial(create_model, "googlenet", paper=True), paper_googlenet, 13_378_280, 224
    ),
    "inception_v3": _inception("inception_v3", 0.4, 27_161_264, 299),
    "inception_v4": _timm("inception_v4", 42_679_816, 107),
    "inception_resnet_v1 without facenet's head": Reference(
        partial(create_model, "inception_resnet_v1", embedding=None),
        partial(plain_inception_resnet_v1, False),
        24_357_096,
        107,
    ),
    "inception_resnet_v1 of the paper": Reference(
        partial(create_model, "inception_resnet_v1", paper=True),
        partial(plain_inception_resnet_v1, False, False),
        22_756_328,
        107,
    ),
    "inception_resnet_v2": _timm("inception_resnet_v2", 55_843_464, 107),
    "vgg11": _torchvision("vgg11", 132_863_336, 32),
    "vgg11_bn": _torchvision("vgg11_bn", 132_868_840, 32),
    "vgg13": _torchvision("vgg13", 133_047_848, 32),
    "vgg13_bn": _torchvision("vgg13_bn", 133_053_736, 32),
    "vgg16": _torchvision("vgg16", 138_357_544, 32),
    "vgg16_bn": _torchvision("vgg16_bn", 138_365_992, 32),
    "vgg19": _torchvision("vgg19", 143_667_240, 32),
    "vgg19_bn": _torchvision("vgg19_bn", 143_678_248, 32),
    "resnet56 option A": _cifar("resnet56", 56, "A", 853_018),
    "plain56": _cifar("plain56", 56, "none", 853_018),
    "densenet161": _torchvision("densenet161", 28_681_000),
    "densenet169": _torchvision("densenet169", 14_149_480),
    "densenet201": _torchvision("densenet201", 20_013_928),
    "densenet264": Reference(
        partial(create_model, "densenet264"),
        partial(torchvision.models.DenseNet, 32, (6, 12, 64, 48), 64),
        33_337_704,
        64,
    ),
    "densenet_bc100_12": _densenet_bc(100, 12, 769_162),
    "densenet_bc190_40": _densenet_bc(190, 40, 25_624_430),
    "densenet_bc250_24": _densenet_bc(250, 24, 15_324_406),
    "wrn28_10": Reference(partial(create_model, "wrn28_10"), partial(get_model, "wrn28_10_cifar10"), 36_479_194, 32),
}
ALL = {**LIGHT, **HEAVY}
