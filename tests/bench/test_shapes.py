"""The benchmarks' layer list is the models' own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from fastcnn.benchmark.shapes import CONV2D, SEPARABLE, Conv2d, Separable


def _convolutions(model: nn.Module, size: int) -> list[tuple[nn.Conv2d, torch.Size]]:
    """The convolutions that a model runs and the shapes of their inputs, in order."""
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: calls.append((m, args[0].shape)))
    model(torch.empty(1, 3, size, size, device="meta"))
    return calls


def _layers(model: nn.Module, name: str, size: int) -> list[Separable]:
    """The (depthwise, pointwise) pairs that a model runs, in order."""
    residual = set()
    for module in model.modules():
        if getattr(module, "use_res_connect", False):
            residual.update(id(m) for m in module.modules())
    calls = _convolutions(model, size)
    pairs = [(a, b) for a, b in zip(calls, calls[1:]) if a[0].groups > 1]
    assert all(b[0].kernel_size == (1, 1) for _, b in pairs)
    return [Separable(name, x[1], b.out_channels, x[2], a.stride[0], id(a) in residual) for (a, x), (b, _) in pairs]


def test_separable_layers_are_those_of_the_models() -> None:
    torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
    with torch.device("meta"):
        mobilenet = torchvision.models.mobilenet_v2().eval()
        xception = timm.create_model("legacy_xception").eval()
    found = _layers(mobilenet, "mobilenet_v2", 224) + _layers(xception, "xception", 299)
    assert Counter(found) == SEPARABLE


def test_3x3_layers_are_those_of_the_models() -> None:
    torchvision = pytest.importorskip("torchvision")
    found = []
    for ours, name in (("resnet50", "resnet50"), ("resnext50", "resnext50_32x4d")):
        with torch.device("meta"):
            model = torchvision.models.get_model(name).eval()
        for conv, x in _convolutions(model, 224):
            if conv.kernel_size == (3, 3):
                found.append(Conv2d(ours, x[1], x[2], conv.stride[0], conv.groups))
    assert Counter(found) == CONV2D
