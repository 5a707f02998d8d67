"""Fused layers under what torch offers for modules: containers, hooks, checkpointing, averaging, DDP, halves, devices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import fastcnn
from fastcnn.nn import (
    BasicBlock,
    Bottleneck,
    ConvBNAct,
    DenseBlock,
    DepthwiseConv2d,
    FusedSequential,
    InvertedResidual,
    PreActBlock,
    SeparableConv2d,
    Transition,
)
from tests.nn.pairs import bn_act_conv, bottleneck, conv_bn_act, downsample, randomise
from tests.tolerances import assert_close, relative_error

LAYERS = {
    "block": lambda: InvertedResidual(16, 16, 1, 2),
    "conv_bn_act": lambda: ConvBNAct(16, 16, bias=True),
    "bn_act_conv": lambda: ConvBNAct(16, 16, order="bn_act_conv"),
    "basic": lambda: BasicBlock(16, 16),
    "bottleneck": lambda: Bottleneck(16, 6, 2, downsample(16, 24, 2)),
    "pre-activation": lambda: PreActBlock(16, 24, 2),
    "dense": lambda: DenseBlock(3, 16, bn_size=2, growth_rate=8),
    "dense, memory efficient": lambda: DenseBlock(3, 16, bn_size=2, growth_rate=8, memory_efficient=True),
    "transition": lambda: Transition(16, 8),
}


@pytest.fixture(params=LAYERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def layer_of(name: str) -> nn.Module:
    """The layer, with the same weights at every call."""
    torch.manual_seed(0)
    return randomise(LAYERS[name]())


def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 16, 9, 7)


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters()]


def step(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and every gradient of one step."""
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), *gradients(module)]


def test_in_a_sequential(name):
    layer, again, head = layer_of(name), layer_of(name), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = images()
    outputs = step(nn.Sequential(layer, *head), x), step(again, x)
    expected = head(outputs[1][0])
    assert_close(outputs[0][0], expected, torch.float32)
    assert all(g.isfinite().all() for g in outputs[0])
    optimized = fastcnn.optimize(nn.Sequential(layer, *head))
    assert_close(optimized(x), head(layer.eval()(x)), torch.float32)


def test_forward_and_backward_hooks_of_the_layer_fire(name):
    layer, x, seen = layer_of(name), images().requires_grad_(), []
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_in[0].shape))
    y = layer(x)
    y.sum().backward()
    assert seen == [y.shape, x.shape]
    assert_close(layer(x), layer_of(name)(2 * x), torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(name, reentrant):
    layer, again, x = layer_of(name), layer_of(name), images()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(a).square().sum().backward()
    checkpoint(again, b, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert all(map(torch.equal, gradients(layer), gradients(again)))


def test_averaged_weights_load_and_run(name):
    layer, x = layer_of(name), images()
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
    fresh = layer_of(name).eval()
    fresh.load_state_dict(average.module.state_dict())
    assert torch.equal(fresh(x), expected)
    assert_close(fastcnn.optimize(average)(x), expected, torch.float32)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_data_parallel_gives_the_same_gradients(name, one_process):
    """Several processes: test_distributed.py."""
    layer, again, x = layer_of(name), layer_of(name), images()
    parallel = DistributedDataParallel(again)
    assert all(map(torch.equal, step(layer, x), step(parallel, x)))
    assert all(map(torch.equal, layer.buffers(), again.buffers()))


def test_half_precision(name):
    layer, x = layer_of(name).eval(), images()
    half = copy.deepcopy(layer).half()
    y = half(x.half())
    assert y.dtype == torch.float16
    exact = copy.deepcopy(half).double()(x.half().double())
    assert_close(y, exact, torch.float16)
    half.train()
    half(x.half()).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float16 and p.grad.isfinite().all() for p in half.parameters())


def test_deferred_initialisation_on_meta(name):
    layer, x = layer_of(name), images()
    with torch.device("meta"):
        deferred = LAYERS[name]()
    assert all(p.is_meta for p in deferred.parameters())
    deferred.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert all(map(torch.equal, step(deferred, x), step(layer, x)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_to_a_device_and_back(name):
    layer, x = layer_of(name), images()
    expected, *_ = step(copy.deepcopy(layer).double(), x.double())
    moved = copy.deepcopy(layer).to("cuda")
    y, *grads = step(moved, x.cuda())
    assert_close(y.cpu(), expected, torch.float32)
    assert all(g.is_cuda and g.isfinite().all() for g in grads)
    assert torch.equal(moved.cpu().eval()(x), moved(x))


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


def test_frozen_parts_get_no_gradient_and_the_rest_the_same(name):
    layer, whole, x = layer_of(name), layer_of(name), images()
    frozen = next(module for module in layer.modules() if isinstance(module, nn.Conv2d))
    frozen.requires_grad_(False)
    for module in (layer, whole):
        module(x).square().sum().backward()
    assert frozen.weight.grad is None
    parts = {id(p) for p in frozen.parameters()}
    for p, q in zip(layer.parameters(), whole.parameters(), strict=True):
        if id(p) in parts:
            assert p.grad is None
        elif isinstance(layer, DenseBlock):  # a 1x1 product without a weight gradient sums in other tiles
            assert relative_error(p.grad, q.grad) <= 1e-6
        else:
            assert torch.equal(p.grad, q.grad)


def test_everything_frozen_passes_a_gradient_to_the_input_only(name):
    layer, x = layer_of(name).requires_grad_(False), images().requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.norm() > 0
    assert all(p.grad is None for p in layer.parameters())
    assert not layer(images()).requires_grad


@pytest.mark.parametrize("make", [conv_bn_act, bn_act_conv, lambda: bottleneck(2, 8)])
def test_frozen_statistics_stay_while_the_rest_trains(make):
    ours, plain = make()
    for module in (ours, plain):
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.fill_(0.25)
                norm.eval()
    before = [b.clone() for b in ours.buffers()]
    for got, expected in zip(step(ours, images()), step(plain.double(), images().double()), strict=True):
        assert_close(got, expected, torch.float32)
    assert all(map(torch.equal, ours.buffers(), before))


def test_a_batch_that_is_refused_is_not_counted(name):
    layer = layer_of(name)
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
    (BasicBlock(8, 8), (X.tolist(),), TypeError, "x: got list, expected a torch.Tensor"),
    (BasicBlock(8, 4), (X,), ValueError, r"residual: got shape \[2, 8, 5, 6\], expected the output's \[2, 4, 5, 6\]"),
    (Bottleneck(8, 2), (X.double(),), TypeError, "convolution 1's weight: got torch.float32"),
    (PreActBlock(8, 8), (X[0],), ValueError, r"x: got shape \[8, 5, 6\], expected 4 dimensions"),
    (FusedSequential(nn.BatchNorm2d(8), nn.ReLU()), (X[:, :7],), ValueError, r"x: got shape \[2, 7, 5, 6\]"),
]


@pytest.mark.parametrize(("layer", "args", "error", "message"), REFUSED)
def test_bad_input_names_the_argument(layer, args, error, message):
    with pytest.raises(error, match=message):
        layer(*args)
