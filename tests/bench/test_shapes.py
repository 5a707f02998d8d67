"""The benchmarks' layer list is the models' own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from fastcnn.benchmark.shapes import SEPARABLE, Separable


def _layers(model: nn.Module, name: str, size: int) -> list[Separable]:
    """The (depthwise, pointwise) pairs that a model runs, in order."""
    calls, residual = [], set()
    for module in model.modules():
        if getattr(module, "use_res_connect", False):
            residual.update(id(m) for m in module.modules())
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: calls.append((m, args[0].shape)))
    model(torch.empty(1, 3, size, size, device="meta"))
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
