"""The capsule layers against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcnn.nn import CapsuleLinear, MarginLoss, PrimaryCaps
from tests.ops.test_capsule_routing import procedure
from tests.ops.test_squash import plain
from tests.tolerances import assert_close


@pytest.mark.parametrize("scale", [1.0, 1 / 32])
def test_primary_capsules(scale):
    layer, x = PrimaryCaps(6, types=4, dim=8, kernel_size=5, scale=scale), torch.randn(3, 6, 13, 11)
    y = layer(x)
    weight, bias = layer.conv.weight.double(), layer.conv.bias.double()
    expected = F.conv2d(x.double(), weight, None, 2) * scale + bias.view(1, -1, 1, 1)
    expected = plain(expected.view(3, 4, 8, 5, 4).permute(0, 1, 3, 4, 2).reshape(3, 80, 8))
    assert_close(y, expected, torch.float32)
    grad = torch.randn(y.shape)
    actual = torch.autograd.grad(y, list(layer.parameters()), grad)
    reference = torch.autograd.grad(expected, list(layer.parameters()), grad.double())
    for a, e in zip(actual, reference, strict=True):
        assert_close(a, e, torch.float32)
    assert list(layer.state_dict()) == ["conv.weight", "conv.bias"]


@pytest.mark.parametrize("bias", [False, True])
def test_capsule_linear(bias):
    layer, u = CapsuleLinear(20, 8, 5, 16, bias=bias), torch.randn(4, 20, 8)
    own = None if layer.bias is None else layer.bias.double()
    assert_close(layer(u), procedure(u.double(), layer.weight.double(), own), torch.float32)
    assert list(layer.state_dict()) == (["weight", "bias"] if bias else ["weight"])
    assert layer.weight.abs().max() <= 0.2
    assert 0.07 < layer.weight.std() < 0.1
    assert repr(layer).startswith("CapsuleLinear(20 x 8 -> 5 x 16, iterations=3")


def test_capsules_in_a_compiled_chain():
    model = nn.Sequential(PrimaryCaps(3, 2, 4, 3), CapsuleLinear(2 * 9, 4, 3, 5))
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), model(x), torch.float32)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_margin_loss():
    v = torch.tensor([[[0.6, 0.8], [0.0, 0.3]], [[0.0, 0.05], [0.5, 0.0]]], requires_grad=True)
    loss = MarginLoss()(v, torch.tensor([0, 0]))
    # lengths 1 and 0.3; 0.05 and 0.5
    assert loss.item() == pytest.approx((0.5 * 0.2**2 + 0.85**2 + 0.5 * 0.4**2) / 2)
    loss.backward()
    assert v.grad[0, 0].abs().max() == 0
    assert MarginLoss()(v.double(), torch.tensor([0, 0])).dtype == torch.float64
    assert MarginLoss(factor=0.5)(v, torch.tensor([0, 0])).item() == pytest.approx(loss.item() / 2)
    assert MarginLoss()(v.norm(dim=-1), torch.tensor([[1, 0], [1, 0]])).item() == pytest.approx(loss.item())
    with pytest.raises(ValueError, match=r"target: got shape \[3\]"):
        MarginLoss()(v, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"capsules: got shape \[2\]"):
        MarginLoss()(torch.ones(2), torch.zeros(2))
