"""Average pooling and a 1x1 convolution in inference: pooled after the product where that has fewer channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastcnn
from fastcnn.nn import AvgPool2d, Branches, FusedSequential
from fastcnn.nn.folded_average import FoldedAverage
from tests.tolerances import assert_close


def trained(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.running_mean.copy_(torch.randn(norm.num_features))
    norm.running_var.copy_(torch.rand(norm.num_features) + 0.5)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def pooled_conv(k: int, c: int, bias: bool = False, **pooling) -> list[nn.Module]:
    return [AvgPool2d(3, 1, 1, **pooling), nn.Conv2d(k, c, 1, bias=bias), trained(nn.BatchNorm2d(c)), nn.ReLU()]


def averages(module: nn.Module) -> int:
    return sum(isinstance(m, FoldedAverage) for m in module.modules())


def check(module: nn.Module, x: Tensor, count: int) -> None:
    optimized = fastcnn.optimize(module.eval())
    assert averages(optimized) == count
    with torch.no_grad():
        assert_close(optimized(x), module.double()(x.double()), torch.float32)


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_layers(counts: bool, bias: bool) -> None:
    rest = [nn.Conv2d(5, 9, 3, padding=1, bias=False), trained(nn.BatchNorm2d(9)), nn.ReLU()]
    layers = pooled_conv(12, 5, bias, count_include_pad=counts)
    check(FusedSequential(*layers, *rest), torch.randn(2, 12, 9, 7), 1)


def test_writes_its_slice_of_branches() -> None:
    branches = Branches(
        pool=nn.Sequential(*pooled_conv(12, 5)),
        conv=nn.Sequential(nn.Conv2d(12, 7, 1, bias=False), trained(nn.BatchNorm2d(7)), nn.ReLU()),
    )
    x = torch.randn(2, 12, 9, 7)
    check(branches, x, 1)
    optimized = fastcnn.optimize(branches.float(), dtype=torch.bfloat16)
    with torch.no_grad():
        assert_close(optimized(x.bfloat16()), branches.double()(x.bfloat16().double()), torch.bfloat16)


def test_large_means_are_shifted_before_they_are_rounded() -> None:
    layers = pooled_conv(12, 5, count_include_pad=False)
    x = torch.randn(2, 12, 9, 7).bfloat16()
    layers[1].weight.data.add_(4)
    x += 1  # products around 48, less their mean of small numbers
    layers[2].running_mean.fill_(48)
    optimized = fastcnn.optimize(FusedSequential(*layers).eval(), dtype=torch.bfloat16)
    assert averages(optimized) == 1
    exact = nn.Sequential(*layers).double()(x.double())
    assert (optimized(x).double() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize(
    "layers",
    [
        pooled_conv(5, 12),  # more channels after it
        [AvgPool2d(2, ceil_mode=True), *pooled_conv(12, 5)[1:]],
        [AvgPool2d(2), *pooled_conv(12, 5)[1:]],  # fewer pixels after it
        [AvgPool2d(3, 1, 0), *pooled_conv(12, 5)[1:]],
        [AvgPool2d(3, 1, 1), nn.Conv2d(12, 5, 1, stride=2)],
        [AvgPool2d(3, 1, 1), nn.Conv2d(12, 5, 3)],
        [AvgPool2d(3, 1, 1), nn.ReLU(), nn.Conv2d(12, 5, 1)],
    ],
)
def test_other_layers_stay_in_their_order(layers: list[nn.Module]) -> None:
    channels = next(m for m in layers if isinstance(m, nn.Conv2d)).in_channels
    check(FusedSequential(*layers), torch.randn(2, channels, 9, 7), 0)


def test_a_hooked_pooling_is_called() -> None:
    layers = pooled_conv(12, 5)
    layers[0].register_forward_hook(lambda module, args, output: 2 * output)
    check(FusedSequential(*layers), torch.randn(2, 12, 9, 7), 0)
