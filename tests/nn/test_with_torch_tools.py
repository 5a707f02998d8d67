"""Fused layers under what torch offers for modules: hooks, checkpointing, averaging, parametrizations, freezing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import fastcnn
from fastcnn.nn import DepthwiseConv2d, InvertedResidual, SeparableConv2d
from tests.tolerances import assert_close


def block() -> InvertedResidual:
    torch.manual_seed(0)
    return InvertedResidual(16, 16, 1, 2)


def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 16, 9, 7)


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters()]


def test_forward_and_backward_hooks_of_the_layer_fire():
    layer, x, seen = block(), images().requires_grad_(), []
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_in[0].shape))
    layer(x).sum().backward()
    assert seen == [x.shape, x.shape]
    plain = block()
    assert_close(layer(x), plain(2 * x), torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    layer, again, x = block(), block(), images()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(a).square().sum().backward()
    checkpoint(again, b, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert all(map(torch.equal, gradients(layer), gradients(again)))


def test_averaged_weights_load_and_run():
    layer, x = block(), images()
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(layer)
    update_bn([x], average)
    average.eval()
    expected = average(x)
    fresh = block().eval()
    fresh.load_state_dict(average.module.state_dict())
    assert torch.equal(fresh(x), expected)
    assert_close(fastcnn.optimize(average)(x), expected, torch.float32)


def test_a_parametrized_weight_learns_through_its_parametrization():
    torch.manual_seed(0)
    layer = SeparableConv2d(16, 24, 3, padding=1)
    parametrizations.weight_norm(layer.pointwise)
    plain = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.Conv2d(16, 24, 1, bias=False))
    plain[0].load_state_dict(layer.depthwise.state_dict())
    parametrizations.weight_norm(plain[1])
    plain[1].load_state_dict(layer.pointwise.state_dict())
    for module in (layer, plain):
        module(images()).square().sum().backward()
    for ours, theirs in zip(gradients(layer), gradients(plain), strict=True):
        assert_close(ours, theirs, torch.float32)


def test_frozen_parts_get_no_gradient_and_the_rest_the_same():
    layer, whole, x = block(), block(), images()
    frozen = layer.conv[0]
    frozen.requires_grad_(False)
    for module in (layer, whole):
        module(x).square().sum().backward()
    assert all(p.grad is None for p in frozen.parameters())
    for (name, p), q in zip(layer.named_parameters(), whole.parameters(), strict=True):
        assert p.grad is None if name.startswith("conv.0") else torch.equal(p.grad, q.grad)


def test_a_batch_that_is_refused_is_not_counted():
    layer = block()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"x: got shape \[4, 15, 9, 7\], expected \[N, 16, H, W\]"):
        layer(images()[:, :15])
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


X = torch.randn(2, 8, 5, 6)
REFUSED = [
    (DepthwiseConv2d(8, 8, 3), (X[:, :7],), ValueError, r"x: got shape \[2, 7, 5, 6\], expected \[N, 8, H, W\]"),
    (DepthwiseConv2d(8, 8, 3), (X[0],), ValueError, r"x: got shape \[8, 5, 6\], expected 4 dimensions"),
    (DepthwiseConv2d(8, 8, 3), (X[:, :, :2],), ValueError, "x: got 2 x 6 pixels before weight"),
    (DepthwiseConv2d(8, 8, 3), (X.double(),), TypeError, "weight: got torch.float32"),
    (SeparableConv2d(8, 4), (X.tolist(),), TypeError, "x: got list, expected a torch.Tensor"),
    (SeparableConv2d(8, 4), (X.long(),), TypeError, "x: got torch.int64"),
    (SeparableConv2d(8, 4), (X, X), ValueError, r"residual: got shape \[2, 8, 5, 6\], expected the output's"),
    (InvertedResidual(8, 8, 1, 6), (X[:, :, :0],), ValueError, "x: got shape .* expected no empty dimension"),
    (SeparableConv2d(8, 4, 7), (X,), ValueError, "x: got 5 x 6 pixels before convolution 1's weight"),
]


@pytest.mark.parametrize(("layer", "args", "error", "message"), REFUSED)
def test_bad_input_names_the_argument(layer, args, error, message):
    with pytest.raises(error, match=message):
        layer(*args)
