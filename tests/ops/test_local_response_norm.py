"""Local response normalisation: values and gradients on every backend, and the public function against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcnn import backends
from fastcnn import nn as fnn
from fastcnn.benchmark import work
from fastcnn.ops import local_response_norm
from tests.ops.cases import (
    CHANNELS,
    DTYPES,
    LAYOUTS,
    check,
    check_opcheck,
    compare_gradients,
    laid_out,
    on_grid,
    require,
)
from tests.tolerances import assert_close

# size, alpha, beta, k: an alpha that makes the neighbours matter, and every power that the kernels know apart
PARAMETERS = [(5, 1.5, 0.75, 1.0), (4, 2.0, 0.5, 0.5), (3, 1.0, 1.0, 2.0), (6, 1.5, 0.6, 1.0), (1, 1.0, -0.5, 1.0)]
PAPER = (5, 1e-4, 0.75, 1.0)


def check_both(x: torch.Tensor, grad: torch.Tensor, parameters: tuple, backend: str) -> None:
    check("local_response_norm_fwd", (x, *parameters), backend)
    check("local_response_norm_bwd", (grad, x, *parameters), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", [*PARAMETERS, PAPER], ids=str)
def test_primitives(backend, poison, dtype, parameters):
    for channels in CHANNELS:
        shape = (2, channels, 3, 4)
        check_both(on_grid(*shape, dtype=dtype), on_grid(*shape, dtype=dtype), parameters, backend)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 33, 64, 65, 1000, 10**9])
def test_sizes(backend, poison, size):
    for channels in (1, 6, 40):
        shape = (1, channels, 3, 3)
        check_both(on_grid(*shape), on_grid(*shape), (size, float(size), 0.75, 1.0), backend)


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (1, 3, 1, 1), (1, 300, 17, 9), (3, 20, 40, 33)])
def test_shapes(backend, poison, shape):
    check_both(on_grid(*shape), on_grid(*shape), PARAMETERS[0], backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend, layout, dtype):
    x, grad = (laid_out(on_grid(2, 19, 6, 8, dtype=dtype), layout) for _ in range(2))
    check_both(x, grad, PARAMETERS[0], backend)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e3, 1e15])
@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.6])
def test_range(backend, scale, beta):
    require(backend, "local_response_norm_fwd")
    x, grad = on_grid(2, 19, 4, 4) * scale, on_grid(2, 19, 4, 4)
    check_both(x, grad, (5, 1e-4, beta, 1.0), backend)


@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.6])
def test_squares_that_just_do_not_overflow(backend, beta):
    x = torch.full((1, 3, 2, 2), 1.5e19)
    require(backend, "local_response_norm_fwd")
    with backends.force(backend):
        y = torch.ops.fastcnn.local_response_norm_fwd(x, 1, 1.0, beta, 1.0)
    assert_close(y, x.double() / (1 + x.double().square()) ** beta, torch.float32)


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 1e30), (-0.5, float("inf"))])
def test_squares_that_overflow_without_a_division(backend, beta, expected):
    x = torch.full((1, 3, 2, 2), 1e30)
    require(backend, "local_response_norm_fwd")
    with backends.force(backend):
        y = torch.ops.fastcnn.local_response_norm_fwd(x, 5, 1e-4, beta, 1.0)
    assert torch.equal(y, torch.full_like(x, expected))


@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.6])
def test_squares_that_overflow_leave_zero(backend, beta):
    require(backend, "local_response_norm_fwd")
    x = torch.full((1, 7, 2, 2), 1e30)
    with backends.force(backend):
        y = torch.ops.fastcnn.local_response_norm_fwd(x, 5, 1e-4, beta, 1.0)
        dx = torch.ops.fastcnn.local_response_norm_bwd(torch.ones_like(x), x, 5, 1e-4, beta, 1.0)
    assert not y.any()
    assert not dx.any()


def test_a_nan_stays_among_its_neighbours(backend):
    require(backend, "local_response_norm_fwd")
    x = on_grid(1, 40, 2, 2)
    x[0, 20, 1, 0] = float("nan")
    with backends.force(backend):
        y = torch.ops.fastcnn.local_response_norm_fwd(x, *PARAMETERS[0])
        dx = torch.ops.fastcnn.local_response_norm_bwd(torch.ones_like(x), x, *PARAMETERS[0])
    assert y.isnan().nonzero().tolist() == [[0, c, 1, 0] for c in range(18, 23)]
    assert dx.isnan().nonzero().tolist() == [[0, c, 1, 0] for c in range(16, 25)]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_torchs(preferred, parameters, dtype):
    x = torch.randn(2, 21, 7, 6).to(dtype)
    compare_gradients(
        lambda t: local_response_norm(t, *parameters), lambda t: F.local_response_norm(t, *parameters), (x,), dtype
    )


def test_float16_is_summed_in_float32():
    x = torch.randn(2, 9, 4, 4).half()
    x[:, 4] = 300  # its square is no float16
    y = local_response_norm(x, 3, 1e-4)
    assert y.dtype == torch.float16
    assert_close(y, F.local_response_norm(x.double(), 3, 1e-4), torch.float16)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 90), st.floats(0.0, 3.0), st.floats(-1.0, 2.0), st.floats(0.25, 4.0),
    st.sampled_from(DTYPES), st.sampled_from(("nhwc", *LAYOUTS)),
)  # fmt: skip
def test_any(shape, size, alpha, beta, k, dtype, layout):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else laid_out(x, layout)
    parameters = size, alpha, beta, k
    compare_gradients(
        lambda t: local_response_norm(t, *parameters), lambda t: F.local_response_norm(t, *parameters), (x,), dtype
    )


def test_repeats_bit_for_bit(preferred):
    x = torch.randn(4, 40, 30, 30, requires_grad=True)
    grad = torch.randn(4, 40, 30, 30)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            y = local_response_norm(x, *PAPER)
            runs.append((y.detach(), *torch.autograd.grad(y, x, grad)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_gradcheck(parameters):
    x = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: local_response_norm(t, *parameters), x)


def test_opcheck(backend):
    if backend == "unfused":
        pytest.skip("the unfused backend has no local response normalisation")
    x, grad = on_grid(2, 7, 4, 4), on_grid(2, 7, 4, 4)
    check_opcheck("local_response_norm_fwd", (x, *PAPER), backend)
    check_opcheck("local_response_norm_bwd", (grad, x, *PAPER), backend)


def test_compiled(preferred):
    x = torch.randn(2, 19, 5, 6, requires_grad=True)
    compiled = torch.compile(lambda t: local_response_norm(t * 2, *PAPER), backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, lambda t: local_response_norm(t * 2, *PAPER)):
        y = function(x)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operations_counted():
    x = on_grid(1, 8, 6, 6)
    assert work.primitive_operations("local_response_norm_fwd", (x, *PAPER), x) == 2 * 5 * 288
    assert work.primitive_operations("local_response_norm_bwd", (x, x, *PAPER), x) == 4 * 5 * 288


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (3, TypeError, "x: got int"),
        (torch.ones(1, 2, 3, 3, dtype=torch.int64), TypeError, r"x: got torch\.int64"),
        (torch.ones(2, 3, 3), ValueError, r"x: got shape \[2, 3, 3\], expected 4 dimensions"),
        (torch.ones(2, 0, 3, 3), ValueError, r"x: got shape \[2, 0, 3, 3\], expected no empty dimension"),
    ],
)
def test_a_wrong_input(x, error, message):
    with pytest.raises(error, match=message):
        local_response_norm(x, 5)


@pytest.mark.parametrize("size", [0, -1, 2.0, None])
def test_a_wrong_size(size):
    with pytest.raises(ValueError, match=r"size: got .*, expected an integer of at least 1"):
        local_response_norm(torch.ones(1, 2, 3, 3), size)


@pytest.mark.parametrize("alpha", [-1e-4, float("inf"), float("nan"), "1"])
def test_a_wrong_alpha(alpha):
    with pytest.raises(ValueError, match=r"alpha: got .*, expected a finite number of at least 0"):
        local_response_norm(torch.ones(1, 2, 3, 3), 5, alpha)


@pytest.mark.parametrize("beta", [float("inf"), float("nan"), None])
def test_a_wrong_beta(beta):
    with pytest.raises(ValueError, match=r"beta: got .*, expected a finite number"):
        local_response_norm(torch.ones(1, 2, 3, 3), 5, beta=beta)


@pytest.mark.parametrize("k", [0.0, -1.0, 1e-40, float("inf"), float("nan")])
def test_a_wrong_k(k):
    with pytest.raises(ValueError, match=r"k: got .*, expected a finite number of at least 1.18e-38"):
        local_response_norm(torch.ones(1, 2, 3, 3), 5, k=k)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "beta": 0.6, "k": 2.0}, {"k": 0.0}, {"alpha": -1e-3}], ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 8, 7), (2, 9, 6), (2, 9, 4, 5, 3), (0, 9, 8, 7)], ids=str)
def test_layer(shape, options):
    x = torch.randn(shape)
    ours, stock = fnn.LocalResponseNorm(4, **options), torch.nn.LocalResponseNorm(4, **options)
    assert repr(ours) == repr(stock)
    torch.testing.assert_close(ours(x), stock(x))
    for dtype in (torch.bfloat16, torch.float16):
        y = ours(x.to(dtype))
        assert y.dtype == dtype
        assert_close(y, stock(x.to(dtype).double()), dtype)
