"""Inputs that backward makes again: the same gradients, less memory, and no way to a wrong result."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastcnn
from fastcnn.benchmark.memory import saved_bytes
from fastcnn.nn import BasicBlock, Bottleneck, ConvBNAct, InvertedResidual, PreActBlock
from fastcnn.ops.rematerialization import is_remade

SHAPE = (2, 16, 8, 8)


def _projected() -> nn.Module:
    shortcut = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
    return Bottleneck(16, 4, downsample=shortcut)


def trunk() -> nn.Sequential:
    """Residuals that were kept, made again, and projected; outputs with and without an activation at the end."""
    torch.manual_seed(0)
    return nn.Sequential(
        Bottleneck(16, 4), Bottleneck(16, 4), _projected(), Bottleneck(16, 4), BasicBlock(16, 16),
        InvertedResidual(16, 16, 1, 2), ConvBNAct(16, 16, 3), PreActBlock(16, 24, 2), PreActBlock(24, 24),
    )  # fmt: skip


def gradients(run, model: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(SHAPE, requires_grad=True)
    model.zero_grad()
    out = run(x)
    out.backward(torch.randn(out.shape))
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def _equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.fixture
def kept(monkeypatch):
    """Runs a function with every input kept."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["fastcnn.ops.conv_chain"], "is_remade", lambda x: False)
            return function(*args)

    return run


def test_the_same_bits_from_less_memory(kept, preferred):
    model = trunk()
    expected = kept(gradients, model, model)
    assert _equal(gradients(model, model), expected)
    x = torch.randn(SHAPE)
    assert saved_bytes(model, lambda: model(x)) < 0.8 * kept(saved_bytes, model, lambda: model(x))


def test_a_block_saves_its_raw_outputs_alone():
    first, second, x = Bottleneck(64, 16), Bottleneck(64, 16), torch.randn(2, 64, 32, 32)
    model, image = nn.Sequential(first, second), x.numel() * 4
    assert 2.5 * image < saved_bytes(first, lambda: first(x)) < 2.6 * image  # x, 16 + 16 + 64 channels
    assert 4 * image < saved_bytes(model, lambda: model(x)) < 4.1 * image


@pytest.mark.parametrize("times", [1, 3])
def test_again_with_a_retained_graph(times):
    model = trunk()
    x = torch.randn(SHAPE)
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    for _ in range(times):
        again = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        assert _equal(list(again), list(first))


def test_an_output_with_several_readers():
    first, left, right = Bottleneck(16, 4), Bottleneck(16, 4), PreActBlock(16, 16)

    def run(x: Tensor) -> Tensor:
        y = first(x)
        return left(y) * right(y) + y

    def separately(x: Tensor) -> Tensor:  # + 0: what no chain made is kept
        y = first(x) + 0
        return left(y) * right(y) + y

    model = nn.ModuleList([first, left, right])
    for actual, expected in zip(gradients(run, model), gradients(separately, model), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("differentiable", [True, False])
def test_an_input_changed_in_place_before_it_is_read(differentiable):
    first, second = Bottleneck(16, 4), Bottleneck(16, 4)

    def run(x: Tensor) -> Tensor:
        y = first(x)
        assert is_remade(y)
        with torch.set_grad_enabled(differentiable):
            y.mul_(2.0)
        assert not is_remade(y)
        return second(y)

    def apart(x: Tensor) -> Tensor:
        y = first(x)
        return second(y * 2 if differentiable else y + y.detach())

    model = nn.ModuleList([first, second])
    for actual, expected in zip(gradients(run, model), gradients(apart, model), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_an_input_changed_in_place_after_it_was_read():
    first, second = Bottleneck(16, 4), Bottleneck(16, 4)
    model = nn.ModuleList([first, second])

    def run(x: Tensor, change: bool) -> Tensor:
        y = first(x)
        out = second(y)
        if change:
            with torch.no_grad():
                y.zero_()
        return out

    assert _equal(gradients(lambda x: run(x, True), model), gradients(lambda x: run(x, False), model))


def test_parameters_changed_between_forward_and_backward_are_an_error():
    model = trunk()
    loss = model(torch.randn(SHAPE)).sum()
    with torch.no_grad():
        model[0].conv3.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_freed_graph_is_torchs_error():
    model = trunk()
    loss = model(torch.randn(SHAPE)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_checkpointed_segments(cut, reentrant, kept):
    model = trunk()
    head, tail = model[:cut], model[cut:]

    def run(x: Tensor) -> Tensor:
        return checkpoint(tail, checkpoint(head, x, use_reentrant=reentrant), use_reentrant=reentrant)

    assert _equal(gradients(run, model), kept(gradients, run, model))


def test_saved_tensors_that_are_packed_elsewhere(kept):
    model = trunk()

    def run(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.shape, t.clone()), lambda p: p[1]):
            return model(x)

    for actual, expected in zip(gradients(run, model), kept(gradients, model, model), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_without_a_graph_nothing_is_promised():
    block = Bottleneck(16, 4)
    with torch.no_grad():
        assert not is_remade(block(torch.randn(SHAPE)))
    assert not is_remade(torch.randn(SHAPE))
    assert not is_remade(block(torch.randn(SHAPE)).detach())
    assert not is_remade(block(torch.randn(SHAPE)) + 1)


def test_nothing_stays_after_a_step():
    """A node lets go of what it made when its own backward has run, though the loss lives on."""
    model = fastcnn.models.create_model("resnet20")
    loss = model(torch.randn(2, 3, 32, 32)).sum()
    loss.backward()
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        assert getattr(node, "unpacked", None) is None
        assert getattr(node, "output", None) is None
        nodes += [n for n, _ in node.next_functions]
    assert any(getattr(n, "output_version", None) is not None for n in seen)
