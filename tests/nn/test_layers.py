"""The layers: torch's keys and arguments, torch's numbers, and everything a module is put through."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastcnn
from tests.nn.pairs import PAIRS, inverted_residual
from tests.parity import farther_than_stock, stock_errors
from tests.tolerances import TOLERANCE, assert_close


def _step(module: nn.Module, x: torch.Tensor, layout=torch.contiguous_format) -> dict[str, torch.Tensor]:
    """The output, every gradient and every running statistic of one step of a copy of the module."""
    module = copy.deepcopy(module).to(x.dtype).to(memory_format=layout)
    y = module(x)
    torch.manual_seed(7)
    y.backward(torch.randn(y.shape).to(y.dtype))
    grads = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return {"output": y, **grads, **{name: b for name, b in module.named_buffers() if b.is_floating_point()}}


def _farther(ours: nn.Module, stock: nn.Module, x: torch.Tensor) -> dict[str, str]:
    expected = _step(stock, x.double())
    stocks = stock_errors(lambda image, layout: _step(stock, image, layout), x, expected)
    return farther_than_stock(_step(ours, x), expected, stocks, TOLERANCE[torch.float32])


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen norms"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_step_equals_torchs(name, frozen):
    make, channels = PAIRS[name]
    seeds = []
    for seed in range(3):
        torch.manual_seed(seed)
        ours, stock = make()
        for norm in [*ours.modules(), *stock.modules()]:
            if isinstance(norm, nn.BatchNorm2d) and frozen:
                norm.eval()
        seeds.append(_farther(ours, stock, torch.randn(3, channels, 12, 10)))
    # One element on the other side of a kink is one seed's luck; an error in a kernel shows in every one.
    assert not [text for key, text in seeds[0].items() if key in seeds[1] or key in seeds[2]]
    assert not seeds[1].keys() & seeds[2].keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_eval_and_optimized_equal_torchs(name, dtype):
    torch.manual_seed(0)
    make, channels = PAIRS[name]
    ours, plain = make()
    x = torch.randn(3, channels, 12, 10)
    plain(x), ours(x)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    ours.eval(), plain.eval()
    with torch.no_grad():
        expected = plain.double()(x.double())
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            assert_close(ours(given), expected, torch.float32)
            y = fastcnn.optimize(ours, dtype=dtype)(given)
            assert y.dtype == torch.float32
            assert_close(y, expected, dtype)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def _saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", PAIRS)
def test_copies_and_pickles(name):
    make, channels = PAIRS[name]
    ours, _ = make()
    x = torch.randn(2, channels, 8, 8)
    optimized = fastcnn.optimize(ours.eval())
    with torch.no_grad():
        for module in (ours, optimized):
            expected = module(x)
            for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), _saved_and_loaded(module)):
                assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_compiles_without_a_graph_break(name, training):
    make, channels = PAIRS[name]
    ours, _ = make()
    ours.train(training)
    x, twin = torch.randn(2, channels, 8, 8), copy.deepcopy(ours)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), twin(x), torch.float32)
    compiled(x).sum().backward()


@pytest.mark.parametrize("name", PAIRS)
def test_exports(name):
    make, channels = PAIRS[name]
    ours, _ = make()
    x = torch.randn(2, channels, 8, 8)
    program = torch.export.export(ours.eval(), (x,))
    with torch.no_grad():
        assert_close(program.module()(x), ours(x), torch.float32)


@pytest.mark.parametrize("name", PAIRS)
def test_autocast_keeps_parameters_in_float32(name):
    make, channels = PAIRS[name]
    ours, plain = make()
    x = torch.randn(4, channels, 14, 14)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    expected = plain.double()(x.double())
    assert_close(y, expected, torch.bfloat16)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("name", PAIRS)
def test_momentum_none_averages(name):
    make, channels = PAIRS[name]
    ours, plain = make()
    for module in (ours, plain):
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None
    plain = plain.double()
    for _ in range(3):
        x = torch.randn(2, channels, 6, 6)
        ours(x), plain(x.double())
    for (key, a), (_, e) in zip(ours.state_dict().items(), plain.state_dict().items(), strict=True):
        assert_close(a, e, torch.float32, key)


class _Twice(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.block(x))


@pytest.mark.parametrize("name", ["block", "basic", "bottleneck", "pre-activation"])
def test_one_module_twice_in_a_graph(name):
    ours, stock = map(_Twice, PAIRS[name][0]())
    assert not _farther(ours, stock, torch.randn(2, 16, 6, 6))


def test_wrong_input_names_the_argument():
    ours, _ = inverted_residual()
    with pytest.raises(ValueError, match=r"x: got shape \[2, 15, 6, 6\], expected \[N, 16, H, W\]"):
        ours(torch.randn(2, 15, 6, 6))
    with pytest.raises(ValueError, match="x: got"):
        fastcnn.optimize(ours)(torch.randn(16, 6, 6))
    with pytest.raises(TypeError, match="model: got int"):
        fastcnn.optimize(3)


def test_repr_tells_the_shape():
    assert "16" in repr(inverted_residual()[0])
    assert "depthwise" in repr(fastcnn.optimize(inverted_residual()[0]))
