"""Branches that write slices of one buffer, and share products, compute what torch.cat of them does; they copy nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastcnn import backends
from fastcnn.nn import BasicConv2d, Branches, MaxPool2d, Transition
from fastcnn.nn.dense import DenseBlock
from fastcnn.ops import Conv, conv_chain
from fastcnn.ops.channel_join import channel_slices
from tests.tolerances import assert_close


def _conv(*args: int, **options: object) -> BasicConv2d:
    return BasicConv2d(*args, **options)


def _inception(batch_norm: bool = True) -> Branches:
    how = {"batch_norm": batch_norm}
    return Branches(
        single=_conv(12, 8, 1, **how),
        tall=nn.Sequential(_conv(12, 6, 1, **how), _conv(6, 10, 3, padding=1, **how)),
        taller=nn.Sequential(_conv(12, 7, 1, **how), _conv(7, 9, (3, 1), padding=(1, 0), **how)),
        pooled=nn.Sequential(MaxPool2d(3, 1, 1), _conv(12, 5, 1, **how)),
    )


def _reduction() -> Branches:
    tall = nn.Sequential(_conv(12, 6, 1), _conv(6, 9, 3, stride=2))
    return Branches(conv=_conv(12, 8, 3, stride=2), tall=tall, pool=MaxPool2d(3, 2))


def _mixed() -> Branches:
    """A linear chain, one ending in a bias and SiLU, a module of torch's, and an input passed on."""
    last = nn.Sequential(nn.Conv2d(12, 6, 1), nn.Conv2d(6, 5, 3, 1, 1), nn.SiLU())
    return Branches(a=nn.Conv2d(12, 4, 1, bias=False), b=last, c=nn.Sigmoid(), d=nn.Identity(), e=nn.Conv2d(12, 3, 1))


BLOCKS = {
    "inception": _inception,
    "with biases": lambda: _inception(False),
    "reduction": _reduction,
    "mixed": _mixed,
}


class _Concatenated(nn.Module):
    """The same branches, each run as torch's modules are, and torch.cat."""

    def __init__(self, block: Branches) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._plain(branch, x) for branch in self.block.children()], 1)

    def _plain(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.Sequential):
            for layer in module:
                x = self._plain(layer, x)
            return x
        if isinstance(module, BasicConv2d):
            y = module.conv(x)
            return F.relu(y if module.bn is None else module.bn(y))
        if isinstance(module, nn.MaxPool2d):
            return F.max_pool2d(x, module.kernel_size, module.stride, module.padding)
        return module(x)


def _results(block: nn.Module, x: Tensor, grad: Tensor, finish=lambda y: y) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    y = finish(block(leaf))
    y.backward(grad.to(y.dtype))
    names = {name.removeprefix("block."): p for name, p in block.named_parameters()}
    buffers = {name.removeprefix("block."): b for name, b in block.named_buffers()}
    return {"y": y.detach(), "dx": leaf.grad, **{n: p.grad for n, p in names.items()}, **buffers}


def _block(name: str, mode: str) -> Branches:
    torch.manual_seed(0)
    block = BLOCKS[name]().train(mode != "eval")
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    if mode == "partly frozen":
        next(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    return block


def _inputs(block: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 12, 9, 11, generator=generator)
    return x, torch.randn(copy.deepcopy(block)(x).shape, generator=generator)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", ["train", "eval", "partly frozen"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_step_equals_concatenated_branches(name: str, mode: str, backend: str) -> None:
    if mode == "partly frozen" and name in ("with biases", "mixed"):
        pytest.skip("no BatchNorm to freeze")
    block = _block(name, mode)
    x, grad = _inputs(block)
    expected = _results(_Concatenated(block).double(), x.double(), grad.double())
    with backends.force(backend):
        got = _results(block, x, grad)
    for key, value in expected.items():
        assert_close(got[key], value, torch.float32, key)


@pytest.mark.parametrize("name", BLOCKS)
def test_autocast_keeps_the_dtypes_of_a_concatenation(name: str) -> None:
    block = _block(name, "train")
    x, _ = _inputs(block)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = block(x), _Concatenated(block)(x)
    assert got.dtype == expected.dtype
    assert_close(got, expected.double(), torch.bfloat16)


class _Checkpointed(nn.Module):
    def __init__(self, block: Branches, use_reentrant: bool) -> None:
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing(use_reentrant: bool, mode: str) -> None:
    block = _block("inception", mode)
    x, grad = _inputs(block)
    expected = _results(_Checkpointed(_Concatenated(block).double(), use_reentrant), x.double(), grad.double())
    got = _results(_Checkpointed(block, use_reentrant), x, grad)
    for key, value in expected.items():
        key = key.replace("block.", "", 1)
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):  # torch may stop before the last
            assert_close(got[key], value, torch.float32, key)


def _leaky() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(12, 4, 1, bias=False), nn.LeakyReLU(0.1, inplace=True))


def test_a_module_of_torchs_may_write_in_place_after_a_first_convolution() -> None:
    torch.manual_seed(0)
    block = Branches(a=_leaky(), b=_leaky())
    x, grad = _inputs(block)
    expected = _results(_Concatenated(block).double(), x.double(), grad.double())
    got = _results(block, x, grad)
    for key, value in expected.items():
        assert_close(got[key], value, torch.float32, key)


class _Called(nn.Module):
    """A branch that is a module of its own, which ends in what backward sees from the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = BasicConv2d(12, 4, 1, batch_norm=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_a_copied_output_is_not_read_in_the_buffer() -> None:
    torch.manual_seed(0)
    block = Branches(a=_Called(), b=nn.Sequential(nn.Conv2d(12, 3, 1, bias=False), nn.BatchNorm2d(3)))
    x, grad = _inputs(block)
    expected = _results(copy.deepcopy(block).double(), x.double(), grad.double())["dx"] * 2
    assert_close(_results(block, x, grad, _doubled_in_place)["dx"], expected, torch.float32)


def test_a_pooling_with_hooks_is_called() -> None:
    block = _block("reduction", "train")
    block.pool.register_forward_pre_hook(lambda _module, args: args[0] * 2)
    block.pool.register_forward_hook(lambda _module, _args, y: y.add_(1.0))
    x, grad = _inputs(block)
    y = block(x.requires_grad_())
    assert_close(y[:, -12:], F.max_pool2d(2 * x.double(), 3, 2) + 1, torch.float32)
    y.backward(grad)


@pytest.mark.parametrize("module", [_reduction, lambda: DenseBlock(2, 12, 2, 4), lambda: BasicConv2d(12, 4, 3)])
def test_batch_statistics_in_inference_mode(module) -> None:
    block = module().train()
    with torch.inference_mode():
        block(torch.randn(2, 12, 9, 9))
    assert all(int(b) == 1 for name, b in block.named_buffers() if name.endswith("num_batches_tracked"))


def test_a_fake_input() -> None:
    block = _block("inception", "train")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = block(mode.from_tensor(torch.empty(8, 12, 128, 128)))
    assert y.shape == (8, 32, 128, 128)


def _doubled_in_place(y: Tensor) -> Tensor:
    return y.mul_(2.0)


def test_a_result_may_be_changed_in_place_where_backward_does_not_read_it() -> None:
    block = _block("inception", "train")
    x, grad = _inputs(block)
    expected = _results(_Concatenated(block).double(), x.double(), grad.double(), _doubled_in_place)
    got = _results(block, x, grad, _doubled_in_place)
    for key, value in expected.items():
        assert_close(got[key], value, torch.float32, key)


def test_a_result_that_backward_reads_changed_in_place_is_torchs_error() -> None:
    block = _block("with biases", "train")  # ReLU's mask is seen from the output
    x, grad = _inputs(block)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _results(block, x, grad, _doubled_in_place)


class _Calls(TorchDispatchMode):
    """Which of torch's own operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def _primitives(run) -> list[str]:
    names: list[str] = []

    def observer(primitive, args, backend, function):
        names.append(primitive)
        return function(*args)

    with backends.observe(observer):
        run()
    return names


@pytest.mark.parametrize("name", ["inception", "reduction"])
def test_no_activation_is_concatenated(name: str) -> None:
    block = _block(name, "train")
    x, _ = _inputs(block)
    with _Calls() as calls:
        block(x.requires_grad_())
    weights = sum(module == "aten::cat" for module in calls.names)
    assert weights == (1 if name == "inception" else 0), "only the weights of a shared product are"


def test_first_1x1_convolutions_are_one_product() -> None:
    block = _block("inception", "train")
    x, grad = _inputs(block)
    names = _primitives(lambda: _results(block, x, grad))
    assert names.count("pointwise_fwd") == names.count("pointwise_bwd") == 2, "three branches' and the pooled one's"
    assert "channel_statistics" not in names


@pytest.mark.parametrize("changed", [False, True])
def test_a_transition_takes_the_statistics_of_the_dense_block_before_it(changed: bool) -> None:
    torch.manual_seed(0)
    block, after = DenseBlock(2, 8, 2, 4), Transition(16, 8)
    x = torch.randn(2, 8, 6, 6)
    stock = copy.deepcopy(after).double()

    def step() -> None:
        y = block(x)
        if changed:  # the block's own backward refuses, as it reads what it wrote
            y.mul_(2.0)
        z = after(y)
        expected = stock.pool(stock.conv(F.relu(stock.norm(y.double()))))
        assert_close(z, expected, torch.float32)
        if not changed:
            z.sum().backward()

    names = _primitives(step)
    assert names.count("channel_statistics") == 1 + changed  # the block's own: of its input
    assert_close(after.norm.running_mean, stock.norm.running_mean, torch.float32)
    assert_close(after.norm.running_var, stock.norm.running_var, torch.float32)


def test_out_is_checked() -> None:
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 1, 1)
    convs = [Conv("pointwise", (weight,))]
    (place,) = channel_slices(torch.empty(2, 3, 5, 5).contiguous(memory_format=torch.channels_last), [3])
    assert conv_chain(x, convs, out=place) is place
    assert_close(place, F.conv2d(x.double(), weight.double()), torch.float32)
    with pytest.raises(ValueError, match=r"out: got shape \[2, 3, 5, 4\].*expected NHWC"):
        conv_chain(x, convs, out=place[..., :4])
    with pytest.raises(ValueError, match=r"out: got shape \[2, 3, 5, 5\].*expected NHWC"):
        conv_chain(x, convs, out=torch.empty(2, 3, 5, 5))
    with pytest.raises(ValueError, match=r"out: got torch.float64.*expected torch.float32"):
        conv_chain(x, convs, out=place.double())


def test_a_poolings_out_is_checked() -> None:
    x, place = torch.randn(2, 4, 8, 8), torch.empty(2, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    assert MaxPool2d(2)(x, out=place) is place
    with pytest.raises(ValueError, match=r"out: got shape \[2, 4, 4, 3\].*expected NHWC"):
        MaxPool2d(2)(x, out=place[..., :3])
    with pytest.raises(ValueError, match=r"out: got torch.bfloat16.*expected torch.float32"):
        MaxPool2d(2)(x, out=place.bfloat16())


def test_inputs_are_checked_before_a_product_is_shared() -> None:
    with pytest.raises(ValueError, match=r"x: got shape \[2, 3, 5, 5\], expected \[N, 12, H, W\]"):
        _block("inception", "train")(torch.randn(2, 3, 5, 5))
