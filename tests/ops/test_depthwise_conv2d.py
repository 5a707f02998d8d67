"""Depthwise convolution: the primitives on every backend, and the public function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcnn import backends, ops
from fastcnn.ops.layout import conv_out_sizes
from tests.ops import cases
from tests.ops.cases import BACKWARD, CHANNELS, DTYPES, FORWARD, LAYOUTS, NEEDS
from tests.tolerances import assert_close

ONE = (1, 1)
# n, channels, multiplier, h, w, kernel, stride, padding, dilation
GEOMETRIES = [
    (2, 16, 1, 9, 7, (3, 3), ONE, ONE, ONE),
    (1, 24, 1, 14, 15, (3, 3), (2, 2), ONE, ONE),
    (1, 33, 2, 8, 11, (3, 3), (1, 2), (0, 1), ONE),
    (2, 17, 1, 13, 9, (5, 5), ONE, (2, 2), (2, 2)),
    (1, 8, 3, 11, 10, (5, 3), (2, 1), (2, 1), ONE),
    (1, 9, 1, 20, 19, (7, 7), (3, 3), (3, 3), ONE),
    (1, 8, 1, 33, 32, (31, 31), ONE, (15, 15), ONE),
    (1, 5, 1, 6, 12, (1, 7), ONE, (0, 3), ONE),
    (2, 32, 1, 5, 5, (3, 3), ONE, (3, 4), ONE),  # more padding than kernel: whole rows of zeros
    (1, 16, 1, 1, 1, (3, 3), ONE, ONE, ONE),
]


def forward_args(geometry, variant, dtype=torch.float32):
    n, c, m, h, w, kernel, *where = geometry
    size = conv_out_sizes((h, w), kernel, *where)
    x, weight = cases.on_grid(n, c, h, w, dtype=dtype), cases.weight(c * m, 1, *kernel, dtype=dtype)
    tail = cases.forward_tail((n, c * m, *size), variant, dtype)
    return (x, weight, *cases.forward_head(c, variant), *tail, *where, variant == "stats")


def backward_args(geometry, variant, needs, dtype=torch.float32):
    n, c, m, h, w, kernel, *where = geometry
    size = conv_out_sizes((h, w), kernel, *where)
    x, weight = cases.on_grid(n, c, h, w, dtype=dtype), cases.weight(c * m, 1, *kernel, dtype=dtype)
    upstream = cases.backward_upstream((n, c * m, *size), variant, dtype)
    return (*upstream, *cases.backward_source(x, variant), weight, *where, *needs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_forward(geometry, variant, dtype, backend, poison):
    cases.check("depthwise_fwd", forward_args(geometry, variant, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", BACKWARD)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_backward(geometry, variant, dtype, backend, poison):
    cases.check("depthwise_bwd", backward_args(geometry, variant, NEEDS[0], dtype), backend)


@pytest.mark.parametrize("needs", NEEDS[1:])
def test_backward_makes_only_what_is_asked(needs, backend, poison):
    cases.check("depthwise_bwd", backward_args(GEOMETRIES[0], "full", needs), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_around_vector_widths(channels, dtype, backend, poison):
    geometry = (1, channels, 1, 6, 9, (3, 3), ONE, ONE, ONE)
    cases.check("depthwise_fwd", forward_args(geometry, "prologue", dtype), backend)
    cases.check("depthwise_bwd", backward_args(geometry, "full", NEEDS[0], dtype), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, poison):
    x, *rest = forward_args(GEOMETRIES[0], "epilogue")
    cases.check("depthwise_fwd", (cases.laid_out(x, layout), *rest), backend)


def test_half_on_the_reference():
    cases.check("depthwise_fwd", forward_args(GEOMETRIES[0], "epilogue", torch.float16), "reference")


def test_opcheck(backend):
    cases.check_opcheck("depthwise_fwd", forward_args(GEOMETRIES[0], "epilogue"), backend)
    cases.check_opcheck("depthwise_fwd", forward_args(GEOMETRIES[2], "stats"), backend)
    cases.check_opcheck("depthwise_bwd", backward_args(GEOMETRIES[0], "full", NEEDS[0]), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_public_function(geometry, dtype, preferred):
    n, c, m, h, w, kernel, *where = geometry
    tensors = [t.to(dtype) for t in (torch.randn(n, c, h, w), cases.weight(c * m, 1, *kernel), torch.randn(c * m))]
    cases.compare_gradients(
        lambda *t: ops.depthwise_conv2d(*t, *where), lambda *t: F.conv2d(*t, *where, groups=c), tensors, dtype
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data):
    draw = lambda lo, hi: data.draw(st.integers(lo, hi))  # noqa: E731
    n, c, m, h, w = draw(1, 3), draw(1, 70), draw(1, 3), draw(1, 17), draw(1, 17)
    kernel = (2 * draw(0, 3) + 1, 2 * draw(1, 4) + 1)
    stride, dilation = (draw(1, 3), draw(1, 3)), (draw(1, 3), draw(1, 3))
    least = [max(0, (dilation[i] * (kernel[i] - 1) + 2 - (h, w)[i]) // 2) for i in (0, 1)]
    padding = (least[0] + draw(0, 2), least[1] + draw(0, 2))
    dtype = data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(0, 1000))
    x, weight = torch.randn(n, c, h, w, dtype=dtype), cases.weight(c * m, 1, *kernel, dtype=dtype)
    actual = ops.depthwise_conv2d(x, weight, None, stride, padding, dilation)
    expected = F.conv2d(x.double(), weight.double(), None, stride, padding, dilation, c)
    assert_close(actual, expected, dtype)


def test_empty_batch(preferred):
    x, weight = torch.randn(0, 8, 5, 6, requires_grad=True), torch.randn(16, 1, 3, 3, requires_grad=True)
    y = ops.depthwise_conv2d(x, weight, torch.randn(16), 2, 1)
    assert y.shape == (0, 16, 3, 3)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_gradcheck():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    with backends.force("reference"):
        assert torch.autograd.gradcheck(lambda *t: ops.depthwise_conv2d(*t, (2, 1), 1, (1, 2)), (x, weight, bias))


X, W = torch.randn(2, 8, 9, 7), torch.randn(8, 1, 3, 3)
BAD = [
    ((X, torch.randn(8, 1, 2, 2)), {}, ValueError, r"weight: got shape \[8, 1, 2, 2\], expected odd kernel"),
    ((X, torch.randn(8, 1, 33, 33)), {"padding": 16}, ValueError, r"weight: .* expected odd kernel sizes from 1 to 31"),
    ((X, torch.randn(12, 1, 3, 3)), {}, ValueError, r"weight: got shape \[12, 1, 3, 3\], expected \[8 \* depth"),
    ((X, torch.randn(8, 8, 3, 3)), {}, ValueError, r"weight: got shape \[8, 8, 3, 3\]"),
    ((X, torch.randn(8, 3, 3)), {}, ValueError, r"weight: got shape \[8, 3, 3\]"),
    ((X, W, torch.randn(7)), {}, ValueError, r"bias: got shape \[7\], expected \[8\]"),
    ((X, W), {"stride": 0}, ValueError, "stride: got 0, expected an integer of at least 1"),
    ((X, W), {"padding": -1}, ValueError, "padding: got -1, expected an integer of at least 0"),
    ((X, W), {"dilation": (1, 2, 3)}, ValueError, "dilation: got"),
    ((X, W), {"dilation": 4}, ValueError, "x: got 9 x 7 pixels before weight, expected at least the reach"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD)
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        ops.depthwise_conv2d(*args, **options)
