"""Pointwise convolution: the primitives on every backend, and the public function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcnn import backends, ops
from tests.ops import cases
from tests.ops.cases import BACKWARD, CHANNELS, DTYPES, FORWARD, LAYOUTS, NEEDS

# n, K, C, h, w, stride: products around tile edges; strips of pixels that end within a tile
GEOMETRIES = [
    (2, 16, 24, 7, 5, (1, 1)),
    (2, 16, 24, 9, 7, (1, 1)),
    (1, 24, 144, 14, 15, (1, 1)),
    (1, 33, 65, 9, 11, (1, 1)),
    (1, 64, 128, 14, 15, (2, 2)),
    (3, 17, 65, 8, 9, (2, 2)),
    (2, 7, 9, 6, 5, (1, 2)),
    (1, 3, 1, 8, 9, (3, 1)),
    (1, 3, 1, 5, 4, (1, 3)),
    (1, 1, 17, 5, 4, (1, 1)),
    (3, 144, 31, 13, 1, (1, 1)),
    (1, 300, 70, 7, 7, (1, 1)),  # 49 rows: uneven microtiles
    (1, 728, 130, 6, 7, (1, 1)),
    (2, 1030, 33, 3, 5, (1, 1)),  # reductions beyond 256 and 512 words cross the blocks of an A tile
    (1, 40, 320, 1, 1, (1, 1)),  # one row takes the wide microtile
    (5, 320, 40, 1, 1, (1, 1)),
    (1, 64, 32, 40, 30, (1, 1)),
    (1, 96, 40, 13, 15, (1, 1)),  # pixels that AMX reads where they are, and some that are copied
]


def forward_args(geometry, variant, dtype=torch.float32):
    n, k, c, h, w, stride = geometry
    out = (n, c, -(-h // stride[0]), -(-w // stride[1]))
    x, weight = cases.on_grid(n, k, h, w, dtype=dtype), cases.weight(c, k, 1, 1, dtype=dtype)
    tail = cases.forward_tail(out, variant, dtype)
    return (x, weight, *cases.forward_head(k, variant), *tail, stride, variant == "stats")


def backward_args(geometry, variant, needs, dtype=torch.float32, residual=False):
    n, k, c, h, w, stride = geometry
    out = (n, c, -(-h // stride[0]), -(-w // stride[1]))
    x, weight = cases.on_grid(n, k, h, w, dtype=dtype), cases.weight(c, k, 1, 1, dtype=dtype)
    upstream = cases.backward_upstream(out, variant, dtype)
    residual = cases.on_grid(n, k, h, w, dtype=dtype) if residual else None
    return (*upstream, *cases.backward_source(x, variant), weight, residual, stride, *needs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_forward(geometry, variant, dtype, backend, poison):
    cases.check("pointwise_fwd", forward_args(geometry, variant, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [32, 34, 35, 96])
def test_only_the_slice_is_read(channels, dtype, backend, poison):
    buffer = torch.full((1, channels + 33, 13, 15), float("nan"), dtype=dtype).to(memory_format=torch.channels_last)
    x, weight, *rest = forward_args((1, channels, 40, 13, 15, (1, 1)), "plain", dtype)
    place = buffer[:, 16 : 16 + channels]
    place.copy_(x)
    cases.check("pointwise_fwd", (place, weight, *rest), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", BACKWARD)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_backward(geometry, variant, dtype, backend, poison):
    cases.check("pointwise_bwd", backward_args(geometry, variant, NEEDS[0], dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["plain", "full"])
@pytest.mark.parametrize("needs", NEEDS[:3])
def test_backward_adds_a_residual(needs, variant, dtype, backend, poison):
    for geometry in GEOMETRIES[2:8]:
        cases.check("pointwise_bwd", backward_args(geometry, variant, needs, dtype, residual=True), backend)


@pytest.mark.parametrize("needs", NEEDS[1:])
def test_backward_makes_only_what_is_asked(needs, backend, poison):
    cases.check("pointwise_bwd", backward_args((1, 33, 65, 9, 11, (1, 1)), "full", needs), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_around_vector_widths(channels, dtype, backend, poison):
    for k, c in ((channels, 19), (19, channels)):
        geometry = (1, k, c, 5, 9, (1, 1))
        for variant in ("prologue", "epilogue"):
            cases.check("pointwise_fwd", forward_args(geometry, variant, dtype), backend)
        cases.check("pointwise_bwd", backward_args(geometry, "full", NEEDS[0], dtype), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, poison):
    x, *rest = forward_args(GEOMETRIES[0], "epilogue")
    cases.check("pointwise_fwd", (cases.laid_out(x, layout), *rest), backend)


def test_half_on_the_reference():
    cases.check("pointwise_fwd", forward_args(GEOMETRIES[0], "epilogue", torch.float16), "reference")


def test_opcheck(backend):
    cases.check_opcheck("pointwise_fwd", forward_args(GEOMETRIES[0], "epilogue"), backend)
    cases.check_opcheck("pointwise_fwd", forward_args((2, 7, 9, 6, 5, (1, 2)), "stats"), backend)
    cases.check_opcheck("pointwise_bwd", backward_args(GEOMETRIES[0], "full", NEEDS[0]), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_public_function(geometry, dtype, preferred):
    n, k, c, h, w, stride = geometry
    tensors = (torch.randn(n, k, h, w), cases.weight(c, k, 1, 1), torch.randn(c))
    tensors = [t.to(dtype) for t in tensors]
    cases.compare_gradients(
        lambda *t: ops.pointwise_conv2d(*t, stride), lambda *t: F.conv2d(*t, stride), tensors, dtype
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, hi) for hi in (3, 300, 150, 12, 12))),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_fuzz(shape, stride, dtype, seed):
    torch.manual_seed(seed)
    n, k, c, h, w = shape
    tensors = [torch.randn(n, k, h, w).to(dtype), cases.weight(c, k, 1, 1).to(dtype)]
    cases.compare_gradients(
        lambda *t: ops.pointwise_conv2d(*t, None, stride), lambda *t: F.conv2d(*t, None, stride), tensors, dtype
    )


def test_empty_batch(preferred):
    x, weight = torch.randn(0, 8, 5, 6, requires_grad=True), torch.randn(4, 8, 1, 1, requires_grad=True)
    y = ops.pointwise_conv2d(x, weight, torch.randn(4), 2)
    assert y.shape == (0, 4, 3, 3)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_gradcheck():
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4, 3), (5, 3, 1, 1), (5,))]
    with backends.force("reference"):
        assert torch.autograd.gradcheck(lambda *t: ops.pointwise_conv2d(*t, (2, 1)), tensors)


X = torch.randn(2, 8, 9, 7)
BAD = [
    ((X, torch.randn(4, 8, 3, 3)), r"weight: got shape \[4, 8, 3, 3\], expected \[C, 8, 1, 1\]"),
    ((X, torch.randn(4, 7, 1, 1)), r"weight: got shape \[4, 7, 1, 1\], expected \[C, 8, 1, 1\]"),
    ((X, torch.randn(4, 8)), r"weight: got shape \[4, 8\]"),
    ((X, torch.randn(0, 8, 1, 1)), r"weight: got shape \[0, 8, 1, 1\]"),
    ((X, torch.randn(4, 8, 1, 1), torch.randn(4, 1)), r"bias: got shape \[4, 1\], expected \[4\]"),
    ((X, torch.randn(4, 8, 1, 1), None, -1), "stride: got -1"),
    ((X, torch.randn(4, 8, 1, 1), None, 1.5), r"stride: got 1\.5"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input(args, message):
    with pytest.raises(ValueError, match=message):
        ops.pointwise_conv2d(*args)
