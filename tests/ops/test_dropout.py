"""Inverted dropout: the generator, the masks bit for bit on every backend, their statistics, and the public functions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastcnn
from fastcnn import backends, ops
from fastcnn.benchmark.memory import saved_bytes
from fastcnn.ops import activations
from fastcnn.ops.dropout import CHANNEL, ELEMENT, SAMPLE, kept, mask_of, threshold
from fastcnn.ops.philox import draws, philox
from tests.ops import cases
from tests.tolerances import assert_close

SEED = (-0x123456789ABCDEF, 0x7EDCBA9876543210)
UNITS = {"element": ELEMENT, "channel": CHANNEL, "sample": SAMPLE}
SHAPES = [
    (1,),
    (31,),
    (3, 5),
    (64, 33),
    (2, 3, 1, 1),
    (2, 7, 5, 3),
    (3, 33, 4, 5),
    (2, 64, 7, 7),
    (5, 2, 3),
    (2, 300, 37, 1),
]
ACTS = tuple(range(len(activations.NAMES)))


def seed_of(key: int = SEED[0], offset: int = SEED[1]) -> Tensor:
    return torch.tensor([key, offset])


def words(*values: int) -> list[Tensor]:
    return [torch.tensor(v) for v in values]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    """The vectors that Random123, the authors' library, publishes for philox4x32-10."""
    assert [int(w) for w in philox(words(*counter), words(*key))] == list(expected)


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_bit_for_bit(shape, p, unit, backend, poison):
    if unit == CHANNEL and len(shape) < 2:
        pytest.skip("one dimension has no channels")
    cases.require(backend, "dropout_fwd")
    x = torch.ones(shape)
    layouts = [x, x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else [x]
    for own in layouts:
        mask = mask_of(own, None, unit)
        with backends.force(backend):
            out = torch.ops.fastcnn.dropout_fwd(own, None, 0, None, p, 3.0, unit, seed_of())
        expected = kept(mask, p, seed_of()).expand(mask.rows, mask.channels).float() * 3
        assert torch.equal(out.as_strided(expected.shape, (mask.channels, 1)), expected)


@pytest.mark.parametrize("first", [(1 << 32) - 5, (1 << 34) - 3])
def test_draws_beyond_32_bits_of_index(first):
    index = torch.arange(first, first + 9)
    expected = [
        int(philox(words(g & 0xFFFFFFFF, g >> 32, 7, 0), words(5, 0))[i & 3]) for i in index.tolist() for g in [i >> 2]
    ]
    assert draws(index, torch.tensor([5, 7])).tolist() == expected


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    p=st.floats(0, 1),
    key=st.integers(-(1 << 63), (1 << 63) - 1),
    offset=st.integers(-(1 << 63), (1 << 63) - 1),
    unit=st.sampled_from(list(UNITS.values())),
    last=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_masks_of_any_shape(shape, p, key, offset, unit, last):
    if unit == CHANNEL and len(shape) < 2:
        unit = SAMPLE
    x = torch.ones(shape)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    seed = seed_of(key, offset)
    with backends.force("reference"):
        expected = torch.ops.fastcnn.dropout_fwd(x, None, 0, None, p, 2.0, unit, seed)
    assert torch.equal(torch.ops.fastcnn.dropout_fwd(x, None, 0, None, p, 2.0, unit, seed), expected)


def fused_arguments(shape, act, dtype, unit, with_residual=True):
    x = cases.on_grid(*shape, dtype=dtype)
    channels = shape[1] if len(shape) == 4 else shape[-1]
    bias = cases.affine(channels)[1]
    return x, bias, act, cases.on_grid(*shape, dtype=dtype) if with_residual else None, 0.3, 1 / 0.7, unit, seed_of()


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", [(3, 33, 4, 5), (2, 64, 7, 7), (9, 130)])
def test_fused_forward_and_backward(shape, dtype, act, unit, backend, poison):
    args = fused_arguments(shape, act, dtype, unit)
    cases.check("dropout_fwd", args, backend)
    cases.check("dropout_fwd", (args[0], None, *args[2:]), backend)
    z, bias, _, grad, *how = args
    for need_bias in (False, True):
        cases.check("dropout_bwd", (grad, z if act else None, bias, act, *how, need_bias), backend)
    cases.check("dropout_bwd", (grad, z if act else None, None, act, *how, False), backend)


def test_a_bias_gradient_over_many_rows(backend):
    args = (cases.on_grid(7000, 24), None, torch.zeros(24), 0, 0.5, 2.0, ELEMENT, seed_of(), True)
    cases.check("dropout_bwd", args, backend)


def test_bits_do_not_depend_on_threads():
    x, bias = cases.on_grid(6, 33, 40, 41), torch.randn(33)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        forward = torch.ops.fastcnn.dropout_fwd(x, bias, 1, x, 0.3, 1 / 0.7, ELEMENT, seed_of())
        results.append([forward, *torch.ops.fastcnn.dropout_bwd(x, x, bias, 1, 0.3, 1 / 0.7, ELEMENT, seed_of(), True)])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_opcheck(unit, backend):
    cases.check_opcheck("dropout_fwd", fused_arguments((2, 9, 3, 4), 1, torch.float32, unit), backend)
    z, bias, act, grad, *how = fused_arguments((2, 9, 3, 4), 1, torch.float32, unit)
    cases.check_opcheck("dropout_bwd", (grad, z, bias, act, *how, True), backend)
    cases.check_opcheck("dropout_inplace", (z, *how), backend)


# --- statistics ---

N = 1 << 20


def bernoulli(p: float, key: int, offset: int = 0) -> Tensor:
    """Which of N elements stay, as 0 and 1."""
    return (ops.dropout(torch.ones(N), p, seed=(key, offset)) > 0).double()


def within(count: float, n: int, probability: float) -> bool:
    """Whether a binomial count is within five standard deviations of its mean: one of 1.7 million is not."""
    return abs(count - n * probability) <= 5 * math.sqrt(n * probability * (1 - probability))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.7, 0.99])
def test_keep_rate(p):
    stay = bernoulli(p, 1)
    assert within(stay.sum().item(), N, 1 - p)
    for word in range(4):  # all four words of a counter are draws
        assert within(stay[word::4].sum().item(), N // 4, 1 - p)


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return ((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()).item() * math.sqrt(a.numel())


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16, 31, 32, 64, 1000, 8192])
def test_neighbours_are_independent(lag):
    stay = bernoulli(0.5, 2)
    assert abs(correlation(stay[:-lag], stay[lag:])) < 5


def test_seeds_offsets_channels_and_samples_are_independent():
    base = bernoulli(0.5, 3)
    for other in (bernoulli(0.5, 4), bernoulli(0.5, 3, 1), bernoulli(0.5, 3, 1 << 32), bernoulli(0.5, 3 + (1 << 32))):
        assert abs(correlation(base, other)) < 5
    planes = (ops.dropout2d(torch.ones(4096, 64, 1, 1), 0.5, seed=5) > 0).double()[:, :, 0, 0]
    assert within(planes.sum().item(), planes.numel(), 0.5)
    assert abs(correlation(planes[:, :-1].flatten(), planes[:, 1:].flatten())) < 5
    assert abs(correlation(planes[:-1].flatten(), planes[1:].flatten())) < 5
    samples = (ops.drop_path(torch.ones(1 << 16, 1), 0.25, seed=6) > 0).double()
    assert within(samples.sum().item(), 1 << 16, 0.75)


def test_calls_draw_anew():
    x = torch.ones(4096)
    masks = [ops.dropout(x) > 0 for _ in range(20)]
    for a, b in itertools.combinations(masks, 2):
        assert within((a == b).sum().item(), 4096, 0.5)


# --- public functions ---


@pytest.mark.parametrize("function", [ops.dropout, ops.dropout2d, ops.drop_path])
def test_probabilities_zero_and_one_are_exact(function):
    x = torch.tensor([[1.0, -2.0, math.inf], [math.nan, 0.5, 3.0]])
    assert function(x, 0.0) is x
    assert function(x, 0.7, False) is x
    assert torch.equal(function(x, 1.0), torch.zeros(2, 3))
    y = x.nan_to_num().requires_grad_()
    function(y, 1.0).sum().backward()
    assert torch.equal(y.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, "0.5", None])
@pytest.mark.parametrize("function", [ops.dropout, ops.dropout2d, ops.drop_path])
def test_what_is_no_probability(function, p):
    with pytest.raises(ValueError, match="expected a probability in"):
        function(torch.ones(2, 3), p)


def test_bad_arguments_are_named():
    x = torch.ones(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"bias: got shape \[4\], expected \[3\]"):
        ops.dropout(x, 0.5, bias=torch.ones(4))
    with pytest.raises(ValueError, match="residual: got shape"):
        ops.dropout(x, 0.5, residual=x[:1])
    with pytest.raises(TypeError, match=r"x: got torch\.int64"):
        ops.dropout(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        ops.dropout2d(torch.ones(3))
    with pytest.raises(ValueError, match="inplace: got True"):
        ops.dropout(x, 0.5, inplace=True, act="relu")
    with pytest.raises(ValueError, match="activation: got 'gelu'"):
        ops.dropout(x, 0.5, act="gelu")
    with pytest.raises(ValueError, match="bias: got one for x of shape"):
        ops.dropout2d(torch.ones(2, 3, 4), 0.5, bias=torch.ones(3))


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "slice", "gaps", "transposed", "expanded"])
@pytest.mark.parametrize("function", [ops.dropout, ops.dropout2d, ops.drop_path])
def test_layouts(function, layout):
    x = torch.rand(4, 6, 5, 7) + 1
    if layout == "transposed":
        x = x.transpose(2, 3)
    elif layout == "expanded":
        x = x[:, :, :1].expand(4, 6, 5, 7)
    elif layout != "nhwc":
        x = cases.laid_out(x, layout)
    else:
        x = x.contiguous(memory_format=torch.channels_last)
    x = x.requires_grad_()
    y = function(x, 0.5, seed=7)
    stays = y != 0
    assert torch.equal(y[stays], x[stays] * 2)
    grad = torch.randn(x.shape)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(dx, torch.where(stays, grad * 2, 0.0))
    if function is not ops.dropout:
        axes = (2, 3) if function is ops.dropout2d else (1, 2, 3)
        assert torch.equal(stays.amax(axes), stays.amin(axes))
    if function is not ops.dropout:  # one decision whatever the layout
        assert torch.equal(stays, function(torch.ones(x.shape), 0.5, seed=7) != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 17, 6, 4), (12, 70)])
@pytest.mark.parametrize("act", activations.NAMES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_fused_gradients(with_residual, act, shape, dtype, preferred):
    channels = shape[1]
    tensors = [torch.randn(shape).to(dtype), torch.randn(channels).to(dtype)]
    tensors += [torch.randn(shape).to(dtype)] if with_residual else []

    def fused(x, bias, residual=None):
        return ops.dropout(x, 0.4, bias=bias, act=act, residual=residual, seed=11)

    own = tensors[0].contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensors[0]
    zeros = ops.dropout(torch.ones_like(own, dtype=torch.float64), 0.4, seed=11)
    tensors[0] = own

    def plain(x, bias, residual=None):
        z = activations.apply(x + bias.view(1, -1, *(1,) * (x.dim() - 2)), activations.code(act)) * zeros
        return z if residual is None else z + residual

    cases.compare_gradients(fused, plain, tensors, dtype)


def test_in_place():
    x = torch.ones(300)
    y = ops.dropout(x, 0.5, inplace=True, seed=1)
    assert y is x
    assert torch.equal(x, ops.dropout(torch.ones(300), 0.5, seed=1))
    leaf = torch.ones(300, requires_grad=True)
    z = leaf * 3
    out = ops.dropout(z, 0.5, inplace=True, seed=1)
    assert out is z
    out.sum().backward()
    assert torch.equal(leaf.grad, 3 * x)
    gaps = torch.ones(4, 10)[:, ::2]
    assert ops.dropout(gaps, 0.5, inplace=True, seed=1).data_ptr() == gaps.data_ptr()
    assert set(gaps.unique().tolist()) <= {0.0, 2.0}
    with pytest.raises(RuntimeError, match="leaf"):
        ops.dropout(leaf, 0.5, inplace=True)


def test_no_mask_is_saved():
    x = torch.randn(64, 1000, requires_grad=True)
    assert saved_bytes(nn.Identity(), lambda: ops.dropout(x)) == 16
    # ReLU's mask is known from the output; another activation needs its input.
    assert saved_bytes(nn.Identity(), lambda: ops.dropout(x * 1, act="relu")) <= 16 + x.numel() * 4


def test_torchs_seed_repeats_a_run():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first = [ops.dropout(x), ops.dropout2d(x.view(10, 100)), ops.drop_path(x.view(100, 10), 0.5)]
    torch.manual_seed(3)
    again = [ops.dropout(x), ops.dropout2d(x.view(10, 100)), ops.drop_path(x.view(100, 10), 0.5)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    one, other = (torch.Generator().manual_seed(9) for _ in range(2))
    assert torch.equal(ops.dropout(x, generator=one), ops.dropout(x, generator=other))
    assert not torch.equal(ops.dropout(x, seed=1), ops.dropout(x, seed=(1, 1)))
    assert torch.equal(ops.dropout(x, seed=1), ops.dropout(x, seed=(1, 0)))
    assert torch.equal(ops.dropout(x, seed=-1), ops.dropout(x, seed=(1 << 64) - 1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same(reentrant):
    layer = nn.Linear(64, 64)

    def run(x):
        return fastcnn.nn.Dropout(0.5)(layer(x)).square()

    def gradients(function):
        torch.manual_seed(5)
        layer.zero_grad()
        x = torch.ones(8, 64, requires_grad=True)
        y = function(x)
        y.sum().backward()
        return y, x.grad, layer.weight.grad.clone()

    expected = gradients(run)
    actual = gradients(lambda x: checkpoint(run, x, use_reentrant=reentrant, preserve_rng_state=True))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("function", [ops.dropout, ops.dropout2d, ops.drop_path])
def test_compiled(function):
    compiled = torch.compile(lambda x: function(x * 1, 0.5), backend="aot_eager", fullgraph=True)

    def run(f):
        torch.manual_seed(1)
        x = torch.ones(16, 8, 4, 4, requires_grad=True)
        results = []
        for _ in range(2):
            y = f(x)
            results += [y.detach(), *torch.autograd.grad(y.sum(), x)]
        return results

    actual, expected = run(compiled), run(lambda x: function(x * 1, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not torch.equal(actual[0], actual[2]), "each call draws anew"


@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (fastcnn.nn.Dropout(0.3), nn.Dropout(0.3)),
        (fastcnn.nn.Dropout(0.3, inplace=True), nn.Dropout(0.3, inplace=True)),
        (fastcnn.nn.Dropout2d(0.3), nn.Dropout2d(0.3)),
    ],
)
def test_layers_are_drop_in(ours, stock):
    assert repr(ours) == repr(stock)
    assert isinstance(ours, type(stock))
    assert ours.state_dict() == stock.state_dict() == {}
    x = torch.rand(64, 32, 8, 8) + 1
    assert ours.eval()(x) is x
    y = ours.train()(x.clone())
    assert_close(y[y != 0], x[y != 0] / 0.7, torch.float32)
    dropped = (y == 0).amin((2, 3)) if isinstance(stock, nn.Dropout2d) else y == 0
    assert within(dropped.sum().item(), dropped.numel(), 0.3)
    assert ours(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    with pytest.raises(ValueError, match="probability"):
        type(ours)(1.5)


def test_dropout2d_takes_three_dimensions_as_torch_does():
    y = fastcnn.nn.Dropout2d(0.5)(torch.ones(500, 4, 5))
    assert y.shape == (500, 4, 5)
    assert torch.equal(y.amax((1, 2)), y.amin((1, 2)))
    assert 0 < (y[:, 0, 0] == 0).sum() < 500


def test_drop_path_layer():
    layer, x, residual = fastcnn.nn.DropPath(0.5), torch.ones(400, 3, 2, 2), torch.full((400, 3, 2, 2), 10.0)
    assert layer.eval()(x) is x
    assert torch.equal(layer(x, residual), x + residual)
    assert set(layer.train()(x, residual).unique().tolist()) == {10.0, 12.0}
    assert set(fastcnn.nn.DropPath(0.5, scale_by_keep=False)(x).unique().tolist()) == {0.0, 1.0}
    assert repr(layer) == "DropPath(drop_prob=0.5)"


def test_mean_and_variance_are_torchs():
    x = torch.ones(1 << 18)
    for p in (0.2, 0.8):
        ours, stock = ops.dropout(x, p, seed=1), F.dropout(x, p)
        assert abs(ours.mean() - stock.mean()) < 0.05
        assert abs(ours.var() - stock.var()) < 0.05 * stock.var()


def test_threshold_is_exact_at_the_ends():
    assert threshold(0.0) == 0
    assert threshold(1.0) == threshold(1 - 2**-34) == 1 << 32
    assert threshold(0.5) == 1 << 31
