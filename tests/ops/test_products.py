"""Pointwise and general convolutions, and the fused primitives built on the same matrix-product core."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcnn import native, ops
from fastcnn.ops.layout import conv_out_size
from tests.ops import cases
from tests.ops.cases import BACKWARD, CHANNELS, DTYPES, FORWARD, LAYOUTS, NEEDS
from tests.tolerances import assert_close

ONE = (1, 1)
# n, k, c, h, w, stride. Reductions beyond 256 and 512 words cross the blocks of an A tile; 7 x 7 and 49 rows cross
# microtiles; one row takes the wide microtile.
POINTWISE = [
    (2, 16, 24, 9, 7, ONE),
    (1, 24, 144, 14, 15, ONE),
    (1, 300, 70, 7, 7, ONE),
    (2, 1030, 33, 3, 5, ONE),
    (1, 40, 320, 1, 1, ONE),
    (3, 17, 65, 8, 9, (2, 2)),
    (1, 3, 1, 5, 4, (1, 3)),
    (1, 64, 32, 40, 30, ONE),
]
# n, k, c, h, w, kernel, stride, padding, dilation
CONV2D = [
    (2, 3, 32, 15, 17, (3, 3), (2, 2), ONE, ONE),
    (1, 32, 64, 9, 8, (3, 3), ONE, (0, 0), ONE),
    (1, 33, 17, 8, 9, (3, 3), ONE, ONE, (2, 2)),
    (1, 5, 7, 11, 12, (7, 1), (2, 1), (3, 0), ONE),
    (2, 1, 6, 12, 12, (5, 5), ONE, (2, 2), ONE),
]
# n, k, c, h, w, kernel, stride, padding, dilation, multiplier
SEPARABLE = [
    (2, 16, 24, 15, 17, (3, 3), (2, 2), ONE, ONE, 1),
    (4, 33, 17, 7, 9, (3, 3), ONE, ONE, ONE, 1),
    (1, 5, 7, 16, 17, (5, 5), ONE, (2, 2), ONE, 2),
    (1, 40, 30, 12, 9, (7, 7), ONE, (3, 3), ONE, 1),
    (5, 7, 9, 9, 9, (3, 3), (2, 2), (2, 2), (2, 2), 1),
    (1, 520, 64, 10, 10, (3, 3), ONE, ONE, ONE, 1),
]


def out_size(h, w, kernel, stride, padding=(0, 0), dilation=ONE):
    return [conv_out_size((h, w)[i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)]


def pointwise_forward(geometry, variant, dtype):
    n, k, c, h, w, stride = geometry
    shape = (n, c, *out_size(h, w, ONE, stride))
    x, weight = cases.on_grid(n, k, h, w, dtype=dtype), cases.weight(c, k, 1, 1, dtype=dtype)
    tail = cases.forward_tail(shape, variant, dtype)
    return (x, weight, *cases.forward_head(k, variant), *tail, stride, variant == "stats")


def pointwise_backward(geometry, variant, needs, dtype):
    n, k, c, h, w, stride = geometry
    x, weight = cases.on_grid(n, k, h, w, dtype=dtype), cases.weight(c, k, 1, 1, dtype=dtype)
    upstream = cases.backward_upstream((n, c, *out_size(h, w, ONE, stride)), variant, dtype)
    return (*upstream, *cases.backward_source(x, variant), weight, stride, *needs)


def conv2d_args(geometry, variant, dtype):
    n, k, c, h, w, kernel, *where = geometry
    x, weight = cases.on_grid(n, k, h, w, dtype=dtype), cases.weight(c, k, *kernel, dtype=dtype)
    tail = cases.forward_tail((n, c, *out_size(h, w, kernel, *where)), variant, dtype)
    return (x, weight, *cases.forward_head(k, variant), *tail, *where, 1, variant == "stats")


def separable_args(geometry, variant, dtype):
    n, k, c, h, w, kernel, *where, m = geometry
    x = cases.on_grid(n, k, h, w, dtype=dtype)
    weights = cases.weight(k * m, 1, *kernel), cases.weight(c, k * m, 1, 1, dtype=dtype)
    middle = (*cases.affine(k * m), cases.RELU6) if variant == "epilogue" else (None, None, cases.NONE)
    tail = cases.forward_tail((n, c, *out_size(h, w, kernel, *where)), variant, dtype)
    return (x, *weights, *cases.forward_head(k, variant), *middle, *tail, *where, variant == "stats")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("geometry", POINTWISE)
def test_pointwise_forward(geometry, variant, dtype, backend, poison):
    cases.check("pointwise_fwd", pointwise_forward(geometry, variant, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", BACKWARD)
@pytest.mark.parametrize("geometry", POINTWISE)
def test_pointwise_backward(geometry, variant, dtype, backend, poison):
    cases.check("pointwise_bwd", pointwise_backward(geometry, variant, NEEDS[0], dtype), backend)


@pytest.mark.parametrize("needs", NEEDS[1:])
def test_pointwise_backward_makes_only_what_is_asked(needs, backend, poison):
    cases.check("pointwise_bwd", pointwise_backward(POINTWISE[0], "full", needs, torch.float32), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_around_vector_widths(channels, dtype, backend, poison):
    for geometry in ((1, channels, 19, 5, 6, ONE), (1, 19, channels, 5, 6, ONE)):
        cases.check("pointwise_fwd", pointwise_forward(geometry, "prologue", dtype), backend)
        cases.check("pointwise_bwd", pointwise_backward(geometry, "full", NEEDS[0], dtype), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, poison):
    x, *rest = pointwise_forward(POINTWISE[0], "epilogue", torch.float32)
    cases.check("pointwise_fwd", (cases.laid_out(x, layout), *rest), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("geometry", CONV2D)
def test_conv2d_forward(geometry, variant, dtype, backend, poison):
    cases.check("conv2d_fwd", conv2d_args(geometry, variant, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", BACKWARD)
@pytest.mark.parametrize("geometry", CONV2D)
def test_conv2d_weight_gradient(geometry, variant, dtype, backend, poison):
    n, k, c, h, w, kernel, *where = geometry
    x, weight = cases.on_grid(n, k, h, w, dtype=dtype), cases.weight(c, k, *kernel, dtype=dtype)
    upstream = cases.backward_upstream((n, c, *out_size(h, w, kernel, *where)), variant, dtype)
    args = (*upstream, *cases.backward_source(x, variant), weight, *where, 1, False, True, False)
    cases.check("conv2d_bwd", args, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("geometry", SEPARABLE)
def test_separable_forward(geometry, variant, dtype, backend, poison):
    cases.check("separable_fwd", separable_args(geometry, variant, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("geometry", [g for g in SEPARABLE if g[-1] == 1])
def test_inverted_residual_forward(geometry, project, dtype, backend, poison):
    n, k, c, h, w, kernel, *where, _ = geometry
    hidden = k + 13
    x = cases.on_grid(n, k, h, w, dtype=dtype)
    weights = (cases.weight(hidden, k, 1, 1, dtype=dtype), cases.weight(hidden, 1, *kernel))
    last = cases.weight(c, hidden, 1, 1, dtype=dtype) if project else None
    residual = cases.on_grid(n, c if project else hidden, *out_size(h, w, kernel, *where), dtype=dtype)
    tail = (*cases.affine(c), cases.NONE) if project else (None, None, cases.NONE)
    inner = (*cases.affine(hidden), cases.RELU6) * 2
    args = (x, *weights, last, *cases.forward_head(k, "prologue"), *inner, *tail, residual, *where)
    cases.check("inverted_residual_fwd", args, backend)


def test_opcheck(backend):
    cases.check_opcheck("pointwise_fwd", pointwise_forward(POINTWISE[0], "stats", torch.float32), backend)
    cases.check_opcheck("pointwise_bwd", pointwise_backward(POINTWISE[0], "full", NEEDS[0], torch.float32), backend)
    cases.check_opcheck("conv2d_fwd", conv2d_args(CONV2D[0], "epilogue", torch.float32), backend)
    cases.check_opcheck("separable_fwd", separable_args(SEPARABLE[0], "epilogue", torch.float32), backend)


@pytest.mark.parametrize("primitive", ["pointwise_fwd", "separable_fwd", "depthwise_fwd"])
def test_statistics_survive_a_large_mean(primitive, backend):
    x = (torch.randn(4, 16, 28, 28) + 1e3).contiguous(memory_format=torch.channels_last)
    identity, centre = torch.eye(16)[:, :, None, None], torch.zeros(16, 1, 3, 3)
    centre[:, :, 1, 1] = 1
    head, tail, where = (None, None, 0), (None, None, 0, None), (ONE, ONE, ONE, True)
    args = {
        "pointwise_fwd": (x, identity, *head, *tail, ONE, True),
        "depthwise_fwd": (x, centre, *head, *tail, *where),
        "separable_fwd": (x, centre, identity, *head, *head, *tail, *where),
    }[primitive]
    cases.check(primitive, args, backend)


@pytest.mark.skipif(native.module() is None, reason="native module not built")
@pytest.mark.parametrize("primitive", ["pointwise_bwd", "separable_fwd"])
def test_bits_do_not_depend_on_threads(primitive):
    if primitive == "pointwise_bwd":
        args = pointwise_backward((4, 24, 144, 20, 21, ONE), "full", NEEDS[0], torch.float32)
    else:
        args = separable_args((3, 24, 40, 20, 21, (3, 3), ONE, ONE, ONE, 1), "stats", torch.float32)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(getattr(torch.ops.fastcnn, primitive)(*args))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz_pointwise(data):
    draw = lambda lo, hi: data.draw(st.integers(lo, hi))  # noqa: E731
    n, k, c, h, w = draw(1, 3), draw(1, 300), draw(1, 90), draw(1, 12), draw(1, 12)
    torch.manual_seed(draw(0, 1000))
    dtype = data.draw(st.sampled_from(DTYPES))
    x, weight = torch.randn(n, k, h, w, dtype=dtype), cases.weight(c, k, 1, 1, dtype=dtype)
    assert_close(ops.pointwise_conv2d(x, weight), F.conv2d(x.double(), weight.double()), dtype)
