"""The dense block against layers that concatenate, in plain torch and float64; the primitives that write to slices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastcnn import backends
from fastcnn.ops import BatchNorm, DenseLayer, dense_block
from tests.ops.cases import DTYPES, NONE, RELU, affine, as64, laid_out, on_grid, require, weight
from tests.tolerances import TOLERANCE, assert_close, relative_error


def layers(count: int, channels: int, growth: int, middle: int, training: bool = True) -> list[DenseLayer]:
    def norm(c: int) -> BatchNorm:
        values = (torch.rand(c) + 0.5, torch.randn(c) / 2, torch.randn(c) / 4, torch.rand(c) + 0.5)
        return BatchNorm(*values, training, 0.1, 1e-5)

    return [
        DenseLayer(norm(c), weight(middle, c, 1, 1), norm(middle), weight(growth, middle, 3, 3))
        for c in range(channels, channels + growth * count, growth)
    ]


def plain(x: Tensor, block: list[DenseLayer]) -> Tensor:
    for layer in block:
        y = x
        for norm, w in (layer[:2], layer[2:]):
            n = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, *norm[4:7])
            y = F.conv2d(torch.relu(n), w, None, 1, w.shape[2] // 2)
        x = torch.cat((x, y), 1)
    return x


def tensors(block: list[DenseLayer]) -> list[Tensor]:
    return [t for n1, w1, n2, w2 in block for t in (n1.weight, n1.bias, w1, n2.weight, n2.bias, w2)]


def copied(block: list[DenseLayer], dtype: torch.dtype, grad: bool = True) -> list[DenseLayer]:
    def own(t: Tensor, learns: bool) -> Tensor:
        return t.detach().to(dtype).clone().requires_grad_(learns)

    def norm(n: BatchNorm) -> BatchNorm:
        return n._replace(
            weight=own(n.weight, grad), bias=own(n.bias, grad), running_mean=own(n.running_mean, False),
            running_var=own(n.running_var, False),
        )  # fmt: skip

    return [DenseLayer(norm(n1), own(w1, grad), norm(n2), own(w2, grad)) for n1, w1, n2, w2 in block]


def run(function, x: Tensor, block: list[DenseLayer], grad: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x, block)
    y.backward(grad.to(y.dtype))
    statistics = [t for n1, _, n2, _ in block for n in (n1, n2) for t in (n.running_mean, n.running_var)]
    return [y, x.grad, *(t.grad for t in tensors(block)), *statistics]


def compare(x: Tensor, block: list[DenseLayer], **options) -> None:
    """float32 within its tolerance of float64, or twice as far from it as torch's own layers are."""
    grad = torch.randn(plain(x.double(), copied(block, torch.float64)).shape)
    ours = run(lambda x, b: dense_block(x, b, **options), x, copied(block, torch.float32), grad)
    exact = run(plain, x.double(), copied(block, torch.float64), grad.double())
    stock = run(plain, x, copied(block, torch.float32), grad)
    for i, (o, e, s) in enumerate(zip(ours, exact, stock, strict=True)):
        bound = max(TOLERANCE[torch.float32], 2 * relative_error(s, e))
        assert relative_error(o, e) <= bound, f"tensor {i}: {relative_error(o, e):.1e}, at most {bound:.1e}"


@pytest.mark.parametrize("memory", ["fast", "min"])
@pytest.mark.parametrize(
    ("shape", "growth", "middle"), [((4, 16, 6, 5), 8, 32), ((2, 24, 7, 7), 12, 48), ((3, 5, 4, 9), 3, 7)]
)
def test_training(preferred, memory, shape, growth, middle):
    compare(torch.randn(shape), layers(4, shape[1], growth, middle), memory=memory)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(2, 9), st.integers(2, 9)),
    st.integers(1, 20), st.integers(1, 40), st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_shapes(shape, growth, middle, count, training):
    torch.manual_seed(0)
    x, block = torch.randn(shape), layers(count, shape[1], growth, middle, training)
    compare(x, block)
    grad = torch.randn(shape[0], shape[1] + count * growth, *shape[2:], dtype=torch.float64)
    ours, exact = (run(f, x.double(), copied(block, torch.float64), grad) for f in (dense_block, plain))
    for i, (o, e) in enumerate(zip(ours, exact, strict=True)):
        assert (o - e).norm() <= 1e-9 * max(1.0, e.norm().item()), f"tensor {i}"


def test_frozen_and_mixed_statistics(preferred):
    block = layers(4, 16, 8, 32)
    frozen = layers(4, 16, 8, 32, training=False)
    x = torch.randn(3, 16, 6, 6)
    compare(x, frozen)
    mixed = [
        a._replace(norm1=b.norm1) if i % 2 else a._replace(norm2=b.norm2) for i, (a, b) in enumerate(zip(block, frozen))
    ]
    compare(x, mixed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference(preferred, dtype):
    x, block = torch.randn(2, 20, 5, 6).to(dtype), layers(3, 20, 12, 16, training=False)
    with torch.no_grad():
        y = dense_block(x, copied(block, torch.float32, grad=False))
    assert_close(y, plain(x.double(), copied(block, torch.float64)), dtype)
    assert torch.equal(y[:, :20], x)


def test_bfloat16_is_no_farther_than_stock(preferred):
    x, block = torch.randn(8, 32, 8, 8), layers(4, 32, 16, 64)
    grad = torch.randn(8, 96, 8, 8)
    exact = run(plain, x.double(), copied(block, torch.float64), grad.double())

    def autocast(function):
        def call(x, b):
            with torch.autocast("cpu", torch.bfloat16):
                return function(x, b)

        return run(call, x, copied(block, torch.float32), grad)

    for i, (o, s, e) in enumerate(zip(autocast(dense_block), autocast(plain), exact, strict=True)):
        bound = max(TOLERANCE[torch.bfloat16], 2 * relative_error(s, e))
        assert relative_error(o, e) <= bound, f"tensor {i}: {relative_error(o, e):.1e}, at most {bound:.1e}"


def test_keeps_the_buffer_and_the_1x1_outputs():
    x, block = torch.randn(2, 16, 8, 8, requires_grad=True), copied(layers(5, 16, 8, 32), torch.float32)
    pixels = 2 * 8 * 8
    for memory, values in (("fast", pixels * (56 + 5 * 32)), ("min", pixels * 56)):
        y = dense_block(x, block, memory=memory)
        large = [
            t for t in y.grad_fn.saved_tensors if t is not None and t.dim() == 4 and t.shape[0] == 2 and t.shape[2] == 8
        ]
        assert sum(t.numel() for t in large) == values


def test_statistics_are_taken_once_per_slice():
    seen = []

    def observer(name, args, backend, function):
        seen.append(name)
        return function(*args)

    with backends.observe(observer):
        dense_block(torch.randn(2, 16, 8, 8), copied(layers(6, 16, 8, 32), torch.float32)).sum().backward()
    assert seen.count("channel_statistics") == 1  # the input's; the others come with the convolutions that write them
    assert "affine_act_sums" not in seen
    assert len(seen) == 1 + 1 + 6 * 2 + 1 + 6 * 2


def test_statistics_that_no_layer_reads_are_not_taken():
    """Where each first BatchNorm is frozen, the slices' statistics are nobody's; the second ones' are theirs alone."""
    trained, frozen = layers(3, 16, 8, 32), layers(3, 16, 8, 32, training=False)
    block = [a._replace(norm1=b.norm1) for a, b in zip(trained, frozen, strict=True)]
    x, seen = torch.randn(2, 16, 8, 8), []
    compare(x, block)

    def observer(name, args, backend, function):
        seen.append((name, args[-1] if name == "conv2d_into" else None))
        return function(*args)

    with backends.observe(observer):
        dense_block(x, copied(block, torch.float32)).sum().backward()
        dense_block(x, copied(block, torch.float32), 0.5).sum().backward()
    assert "channel_statistics" not in [name for name, _ in seen]
    assert [stats for name, stats in seen if name == "conv2d_into"] == [False] * 3


def test_dropout():
    x, block = torch.randn(4, 16, 8, 8), layers(3, 16, 8, 32)
    torch.manual_seed(3)
    y = dense_block(x, copied(block, torch.float32), 0.5)
    zeros = (y[:, 16:] == 0).double().mean().item()
    assert abs(zeros - 0.5) < 0.04
    torch.manual_seed(3)
    assert torch.equal(y, dense_block(x, copied(block, torch.float32), 0.5))
    assert torch.equal(dense_block(x, copied(block, torch.float32), 1.0)[:, 16:], torch.zeros(4, 24, 8, 8))
    masks = [(y[:, c : c + 8] != 0).double() * 2 for c in (16, 24, 32)]

    def masked(x: Tensor, b: list[DenseLayer]) -> Tensor:
        for layer, mask in zip(b, masks, strict=True):
            own = plain(x, [layer])[:, -8:]
            x = torch.cat((x, own * mask.to(x.dtype)), 1)
        return x

    def seeded(x: Tensor, b: list[DenseLayer]) -> Tensor:
        torch.manual_seed(3)
        return dense_block(x, b, 0.5)

    grad = torch.randn(y.shape)
    ours = run(seeded, x, copied(block, torch.float32), grad)
    exact = run(masked, x.double(), copied(block, torch.float64), grad.double())
    for i, (o, e) in enumerate(zip(ours[:2], exact[:2])):
        assert relative_error(o, e) < 1e-4, i


def test_changes_in_place_are_errors():
    x, block = torch.randn(2, 16, 8, 8, requires_grad=True), copied(layers(2, 16, 8, 32), torch.float32)
    y = dense_block(x, block)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = dense_block(x, block)
    y.detach()[:, 3].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_incoming_gradient_is_left_alone():
    x, block = torch.randn(2, 16, 8, 8, requires_grad=True), copied(layers(2, 16, 8, 32), torch.float32)
    grad = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    before = grad.clone()
    dense_block(x, block).backward(grad)
    assert torch.equal(grad, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    x, block = torch.randn(2, 16, 8, 8), layers(3, 16, 8, 32)
    grad = torch.randn(2, 40, 8, 8)
    once = run(dense_block, x, copied(block, torch.float32), grad)
    again = run(
        lambda x, b: checkpoint(dense_block, x, b, use_reentrant=reentrant), x, copied(block, torch.float32), grad
    )
    for a, b in zip(again[: 2 + 18], once[: 2 + 18], strict=True):
        assert torch.equal(a, b)


def test_compiled():
    x, block = torch.randn(2, 16, 8, 8), layers(2, 16, 8, 32)
    grad = torch.randn(2, 32, 8, 8)
    eager = run(dense_block, x, copied(block, torch.float32), grad)
    compiled = run(
        torch.compile(dense_block, backend="aot_eager", fullgraph=True), x, copied(block, torch.float32), grad
    )
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


def into(primitive: str, out: Tensor, args: tuple, backend: str) -> None:
    """Runs a primitive that writes to a slice, and compares the slice, what is around it, and its results."""
    require(backend, primitive)
    whole = torch.full((out.shape[0], *out.shape[2:], out.shape[1] + 9), 7.0, dtype=out.dtype).permute(0, 3, 1, 2)
    view = whole[:, 4 : 4 + out.shape[1]]
    view.copy_(out)
    exact = out.double()
    expected = backends.REFERENCES[primitive](exact, *map(as64, args))
    with backends.force(backend):
        actual = getattr(torch.ops.fastcnn, primitive)(view, *args)
    assert_close(view, exact, out.dtype, primitive)
    assert (whole[:, :4] == 7).all()
    assert (whole[:, 4 + out.shape[1] :] == 7).all()
    actual, expected = list(actual or ()), list(expected or ())
    if not primitive.endswith("bwd_into") and expected and expected[0].numel():
        # A mean of values around zero has no digits of its own: its error is measured against the values' size.
        size = (expected[0].square() + expected[1]).sum().sqrt()
        actual[0], expected[0] = (actual[0] - expected[0]) / size, torch.zeros_like(expected[0])
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, out.dtype, f"{primitive} result {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 12, 16, 32, 33, 40])
def test_slices(backend, dtype, channels):
    if backend == "unfused":
        pytest.skip("the unfused backend writes no slices")
    where, none = ((1, 1), (1, 1), (1, 1), 1), (None, None, NONE, None)
    x, out = laid_out(on_grid(2, 24, 6, 7, dtype=dtype), "slice"), torch.zeros(2, channels, 6, 7, dtype=dtype)
    head = (*affine(24), RELU)
    into("conv2d_into", out, (x, weight(channels, 24, 3, 3), *head, *none, *where, True), backend)
    seed = torch.tensor([channels, 5])
    dropped = (x, weight(channels, 24, 3, 3), *head, *where[:3], 0.4, 1 / 0.6, seed, True)
    into("conv2d_dropout_into", out, dropped, backend)
    into("conv2d_dropout_into", out, (*dropped[:8], 1.0, 1.0, seed, False), backend)
    into("pointwise_into", out, (x, weight(channels, 24, 1, 1), *head, *none, (1, 1), True), backend)
    into("affine_act_into", out, (on_grid(2, channels, 6, 7, dtype=dtype), *affine(channels), RELU, None), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", [NONE, RELU])
@pytest.mark.parametrize(("channels", "outputs"), [(1, 4), (7, 48), (16, 16), (33, 20), (64, 128), (40, 300)])
@pytest.mark.parametrize("need", [(True, True), (False, True), (False, False), (True, False)])
def test_accumulated_gradient(backend, dtype, act, channels, outputs, need):
    if backend == "unfused":
        pytest.skip("the unfused backend writes no slices")
    x, y = (laid_out(on_grid(2, c, 6, 7, dtype=dtype), "slice") for c in (channels, outputs))
    grad, out = on_grid(2, outputs, 6, 7, dtype=dtype), on_grid(2, channels, 6, 7, dtype=dtype)
    coef = torch.randn(4, outputs)
    args = (
        grad,
        y,
        None,
        None,
        NONE,
        coef,
        x,
        *affine(channels),
        act,
        torch.randn(channels),
        weight(outputs, channels, 1, 1),
    )
    into("pointwise_bwd_into", out, (*args, *need), backend)


def test_wrong_arguments():
    x, block = torch.randn(2, 16, 4, 4), layers(2, 16, 8, 32)
    with pytest.raises(ValueError, match="layers: got no layer"):
        dense_block(x, [])
    with pytest.raises(
        ValueError, match=r"layers\[0\].weight1: got shape \[32, 16, 1, 1\], expected \[C, 12, 1, 1\]|norm1"
    ):
        dense_block(x[:, :12], block)
    with pytest.raises(ValueError, match=r"layers\[1\].weight2: got shape"):
        dense_block(x, [block[0], block[1]._replace(weight2=torch.randn(4, 32, 3, 3))])
    with pytest.raises(ValueError, match="memory: got 'least', expected one of fast, min"):
        dense_block(x, block, memory="least")
    with pytest.raises(ValueError, match=r"drop_rate: got 1\.5"):
        dense_block(x, block, drop_rate=1.5)
    with pytest.raises(ValueError, match="batch statistics: got 1 value per channel"):
        dense_block(x[:1, :, :1, :1], block)
