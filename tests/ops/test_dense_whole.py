"""The dense block as one call of the C++ core against its primitives, one by one on the same kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from fastcnn import backends, native
from fastcnn.cpu import dense_block as whole
from fastcnn.ops import DenseLayer, dense_block
from fastcnn.ops.dense_layers import Block, Dropout
from fastcnn.ops.normalisation import Kind
from tests.ops.test_dense_block import copied, layers, plain, run
from tests.tolerances import TOLERANCE, relative_error

pytestmark = pytest.mark.skipif(native.module() is None, reason="native module not built")


@contextlib.contextmanager
def primitives() -> Iterator[list[str]]:
    """Within the block every primitive is seen, and so none may be part of a larger call."""
    seen: list[str] = []

    def observer(name: str, args: tuple, backend: str, function: Callable) -> object:
        seen.append(name)
        return function(*args)

    with backends.observe(observer):
        yield seen


@contextlib.contextmanager
def whole_calls() -> Iterator[list[str]]:
    """The forwards and backwards of whole blocks that run within."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "backward"):
            original = getattr(whole, name)
            patch.setattr(whole, name, lambda *a, n=name, f=original, **k: (calls.append(n), f(*a, **k))[1])
        yield calls


@contextlib.contextmanager
def as_one_call() -> Iterator[None]:
    """Within the block a forward and a backward run as one call each."""
    with whole_calls() as calls:
        yield
    assert calls == ["forward", "backward"]


def assert_same(x: Tensor, block: list[DenseLayer], dtype: torch.dtype, **options) -> None:
    """The same kernels: where vectors per channel round otherwise, no farther from float64 than primitives are."""
    grad = torch.randn(x.shape[0], x.shape[1] + len(block) * block[0].weight2.shape[0], *x.shape[2:])

    def in_dtype(dtype: torch.dtype, parameters: torch.dtype) -> list[Tensor]:
        return run(lambda x, b: dense_block(x.to(dtype), b, **options), x, copied(block, parameters), grad)

    with as_one_call():
        once = in_dtype(dtype, torch.float32)
    with primitives() as seen:
        apart, exact = in_dtype(dtype, torch.float32), in_dtype(torch.float64, torch.float64)
    assert "pointwise_bwd_into" in seen
    for i, (a, b, e) in enumerate(zip(once, apart, exact, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        bound = max(TOLERANCE[dtype], 2 * relative_error(b, e))
        assert relative_error(a, b) <= bound, f"tensor {i}: {relative_error(a, b):.1e}, at most {bound:.1e}"


def mixed(count: int, channels: int, growth: int, middle: int, trained: int) -> list[DenseLayer]:
    """Layers whose normalisations train where ``trained`` has a bit."""
    batch, frozen = (layers(count, channels, growth, middle, training=t) for t in (True, False))
    return [
        a._replace(norm1=(a if trained >> 2 * i & 1 else b).norm1, norm2=(a if trained >> 2 * i & 2 else b).norm2)
        for i, (a, b) in enumerate(zip(batch, frozen, strict=True))
    ]


@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 40, 9, 9))),
    growth=st.integers(1, 40),
    middle=st.integers(1, 70),
    count=st.integers(1, 4),
    trained=st.integers(0, 255),
    memory=st.sampled_from(["fast", "min"]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_shapes(shape, growth, middle, count, trained, memory):
    if shape[0] * shape[2] * shape[3] < 4:
        shape = (4, *shape[1:])
    torch.manual_seed(0)
    assert_same(torch.randn(shape), mixed(count, shape[1], growth, middle, trained), torch.float32, memory=memory)


@pytest.mark.parametrize("memory", ["fast", "min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(preferred, poison, dtype, memory):
    if backends.forced() == "reference":
        pytest.skip("the reference is made of primitives")
    torch.manual_seed(0)
    assert_same(torch.randn(4, 24, 8, 8), layers(3, 24, 12, 48), dtype, memory=memory)


def test_one_call_each_way():
    x, block = torch.randn(2, 16, 8, 8), copied(layers(3, 16, 8, 32), torch.float32)
    with whole_calls() as calls:
        dense_block(x, block).sum().backward()
        with torch.no_grad():
            dense_block(x, copied(layers(3, 16, 8, 32, training=False), torch.float32, grad=False))
    assert calls == ["forward", "backward", "forward"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_primitives_where_one_call_cannot_run():
    x, block = torch.randn(2, 16, 8, 8), copied(layers(3, 16, 8, 32), torch.float32)
    with whole_calls() as calls:
        dense_block(x, block, 0.5).sum().backward()
        dense_block(x.double(), copied(layers(3, 16, 8, 32), torch.float64)).sum().backward()
        with backends.force("reference"):
            dense_block(x, block).sum().backward()
        torch.compile(dense_block, backend="aot_eager")(x, block).sum().backward()
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            assert dense_block(x, block).shape == (2, 40, 8, 8)
        with torch.profiler.profile():
            dense_block(x, block).sum().backward()
        with torch.device("meta"):
            assert dense_block(x, block).device == x.device
        frozen = copied(layers(3, 16, 8, 32, training=False), torch.float32, grad=False)
        torch.jit.trace(lambda x: dense_block(x, frozen), x, check_trace=False)
    assert calls == []


def test_running_statistics_count_as_changed():
    x, block = torch.randn(2, 16, 8, 8), copied(layers(2, 16, 8, 32), torch.float32)
    dense_block(x, block)
    assert all(t._version == 1 for n1, _, n2, _ in block for n in (n1, n2) for t in (n.running_mean, n.running_var))


@pytest.mark.parametrize("wanted", ["weights1", "scales", "x", "nothing but a shift"])
def test_only_the_gradients_asked_for(wanted):
    x, block = torch.randn(2, 16, 6, 6), layers(3, 16, 8, 32)

    def asked(b: list[DenseLayer]) -> list[Tensor]:
        if wanted == "weights1":
            return [layer.weight1 for layer in b]
        if wanted == "scales":
            return [n.weight for layer in b for n in (layer.norm1, layer.norm2)]
        return [] if wanted == "x" else [b[1].norm2.bias]

    results = []
    for context in (as_one_call(), primitives()):
        b, own = copied(block, torch.float32, grad=False), x.clone().requires_grad_(wanted == "x")
        for t in asked(b):
            t.requires_grad_()
        with context:
            dense_block(own, b).square().sum().backward()
        everything = [t for n1, w1, n2, w2 in b for t in (n1.weight, n1.bias, w1, n2.weight, n2.bias, w2)]
        assert [t.grad is not None for t in everything] == [t.requires_grad for t in everything]
        results.append([t.grad for t in [*asked(b), *([own] if wanted == "x" else [])]])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= 2e-6


def test_parameters_in_any_form():
    """Parameters in bf16, weights in NHWC, none of BatchNorm's: as the primitives take them."""
    torch.manual_seed(0)
    x, block = torch.randn(2, 16, 6, 6), layers(3, 16, 8, 32)
    nhwc = [layer._replace(weight2=layer.weight2.contiguous(memory_format=torch.channels_last)) for layer in block]
    bare = [
        layer._replace(norm1=layer.norm1._replace(weight=None, bias=None), norm2=layer.norm2._replace(bias=None))
        for layer in block
    ]
    for b, given_x in ((nhwc, x), (bare, x), (copied(block, torch.bfloat16), x.bfloat16())):
        leaves = [t for layer in b for t in (layer.weight1, layer.weight2)]
        grads = []
        for context in (as_one_call(), primitives()):
            own = [t.detach().clone().requires_grad_() for t in leaves]
            weights = iter(own)
            given = [layer._replace(weight1=next(weights), weight2=next(weights)) for layer in b]
            with context:
                dense_block(given_x, given).square().sum().backward()
            assert all(t.grad.dtype == t.dtype for t in own)
            assert all(t.grad.stride() == t.stride() for t in own)
            grads.append([t.grad for t in own])
        for once, apart in zip(*grads, strict=True):
            assert relative_error(once, apart) <= (2e-6 if once.dtype is torch.float32 else 5e-3)


def test_saved_tensors_kept_elsewhere():
    """Hooks on saved tensors may give them back with other strides."""
    x, block = torch.randn(2, 16, 6, 6), layers(3, 16, 8, 32)
    grad = torch.randn(2, 40, 6, 6)
    with as_one_call():
        usual = run(dense_block, x, copied(block, torch.float32), grad)

    def elsewhere(x: Tensor, b: list[DenseLayer]) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.stack((t, t + 1), -1), lambda t: t[..., 0]):
            return dense_block(x, b)

    with as_one_call():
        kept = run(elsewhere, x, copied(block, torch.float32), grad)
    for a, b in zip(kept, usual, strict=True):
        assert torch.equal(a, b)


def test_twice_through_one_graph():
    x, block = torch.randn(2, 16, 6, 6, requires_grad=True), copied(layers(3, 16, 8, 32), torch.float32)
    y = dense_block(x, block).square().sum()
    first = torch.autograd.grad(y, [x, block[0].weight1], retain_graph=True)
    again = torch.autograd.grad(y, [x, block[0].weight1])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_weight_changed_before_backward_is_an_error():
    x, block = torch.randn(2, 16, 6, 6), copied(layers(3, 16, 8, 32), torch.float32)
    y = dense_block(x, block).sum()
    with torch.no_grad():
        block[1].weight2.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("memory", ["fast", "min"])
@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_watched_one_way(reentrant, memory, watched):
    """Both keep the same, so that what is made again may run as primitives where the forward did not, or otherwise."""
    x, block = torch.randn(2, 16, 6, 6, requires_grad=True), copied(layers(2, 16, 8, 32), torch.float32)
    contexts = {"forward": contextlib.nullcontext, "backward": contextlib.nullcontext, watched: primitives}
    with contexts["forward"]():
        y = checkpoint(dense_block, x, block, 0.0, memory, use_reentrant=reentrant).sum()
    with contexts["backward"]():
        y.backward()
    with contexts["forward"]():
        again = dense_block(x, copied(block, torch.float32), memory=memory).sum()
    with contexts["backward"]():
        expected = torch.autograd.grad(again, x)[0]
    assert relative_error(x.grad, expected) <= 2e-6


def test_a_backward_that_is_traced():
    x, block = torch.randn(2, 16, 6, 6, requires_grad=True), copied(layers(2, 16, 8, 32), torch.float32)
    y = dense_block(x, block)

    def backward(grad: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    graph, grad = make_fx(backward)(torch.randn(y.shape)), torch.randn(y.shape)
    assert relative_error(graph(grad), backward(grad)) <= 2e-6


def test_a_forced_backend_refuses_other_devices():
    x, block = torch.randn(2, 16, 6, 6, device="meta"), layers(2, 16, 8, 32)
    with backends.force("cpu"):
        assert (
            backends.composite("dense_block", x, Block(((Kind("train"), Kind("train")),) * 2, Dropout((0, 1, 1))), [])
            is None
        )
        with pytest.raises((backends.BackendError, ValueError)):
            dense_block(x, block)


def test_negated_memory():
    """Of a tensor whose memory holds other values than it has, the values are read."""
    x, block = torch.randn(2, 16, 6, 6), copied(layers(2, 16, 8, 32), torch.float32, grad=False)
    x = x.contiguous(memory_format=torch.channels_last)
    assert relative_error(dense_block(torch._neg_view(x), block), dense_block(-x, block)) <= 2e-6
    x.requires_grad_()
    y = dense_block(x, block)
    grad = torch.randn(y.shape).contiguous(memory_format=torch.channels_last)
    of_view, of_values = (torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in (torch._neg_view(grad), -grad))
    assert relative_error(of_view, of_values) <= 2e-6


@pytest.mark.parametrize(
    "of", [lambda y: y.sum(), lambda y: y[:, 5:].square().sum(), lambda y: y.contiguous().square().sum()]
)
def test_gradients_in_any_layout(of):
    x, block = torch.randn(2, 16, 6, 6), layers(2, 16, 8, 32)
    grads = []
    for context in (as_one_call(), primitives()):
        own = x.clone().requires_grad_()
        with context:
            of(dense_block(own, copied(block, torch.float32))).backward()
        grads.append(own.grad)
    assert relative_error(*grads) <= 2e-6


def test_layers_that_share_parameters():
    x, block = torch.randn(2, 16, 6, 6), copied(layers(3, 16, 8, 32), torch.float32)
    block = [layer._replace(norm2=block[0].norm2, weight2=block[0].weight2) for layer in block]
    grads, statistics = [], []
    for context in (as_one_call(), primitives()):
        norm = block[0].norm2._replace(running_mean=torch.zeros(32), running_var=torch.ones(32), momentum=0.3)
        shared = [layer._replace(norm2=norm) for layer in block]
        with context:
            loss = dense_block(x, shared).square().sum()
            grads.append(torch.autograd.grad(loss, [norm.weight, norm.bias, block[0].weight2]))
        statistics.append((norm.running_mean, norm.running_var))
    for a, b in zip((*grads[0], *statistics[0]), (*grads[1], *statistics[1]), strict=True):
        assert relative_error(a, b) <= 2e-6


def test_momenta_of_their_own():
    x, block = torch.randn(2, 16, 6, 6), layers(2, 16, 8, 32)
    block = [
        layer._replace(norm1=layer.norm1._replace(momentum=0.1 + i), norm2=layer.norm2._replace(momentum=0.2))
        for i, layer in enumerate(copied(block, torch.float32))
    ]
    twin = copied(block, torch.float32)
    dense_block(x, block)
    plain(x, twin)
    for ours, stock in zip(block, twin, strict=True):
        for a, b in ((ours.norm1, stock.norm1), (ours.norm2, stock.norm2)):
            assert relative_error(a.running_mean, b.running_mean) <= 1e-5
            assert relative_error(a.running_var, b.running_var) <= 1e-5
