"""The general convolution: the primitives on every backend, and the public function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcnn import backends, ops
from fastcnn.ops.layout import conv_out_sizes
from tests.ops import cases
from tests.ops.cases import BACKWARD, DTYPES, FORWARD, LAYOUTS, NEEDS
from tests.tolerances import assert_close

ONE = (1, 1)
# n, K, C, h, w, kernel, stride, padding, dilation, groups
GEOMETRIES = [
    (2, 3, 32, 13, 15, (3, 3), (2, 2), ONE, ONE, 1),  # MobileNet-v2's stem
    (1, 3, 32, 13, 14, (3, 3), (2, 2), (0, 0), ONE, 1),  # Xception's
    (1, 32, 64, 9, 8, (3, 3), ONE, (0, 0), ONE, 1),
    (1, 17, 9, 7, 9, (3, 3), ONE, ONE, (2, 1), 1),
    (1, 5, 7, 12, 11, (7, 7), (2, 2), (3, 3), ONE, 1),
    (2, 8, 16, 6, 5, (2, 4), (1, 2), (1, 2), ONE, 1),
    (1, 12, 8, 6, 7, (3, 3), ONE, ONE, ONE, 4),
    (1, 1, 33, 5, 6, (1, 3), ONE, (0, 1), ONE, 1),
    (2, 3, 32, 15, 17, (3, 3), (2, 2), ONE, ONE, 1),
    (1, 33, 17, 8, 9, (3, 3), ONE, ONE, (2, 2), 1),
    (1, 5, 7, 11, 12, (7, 1), (2, 1), (3, 0), ONE, 1),
    (2, 1, 6, 12, 12, (5, 5), ONE, (2, 2), ONE, 1),
    (3, 64, 48, 7, 7, (3, 3), ONE, ONE, ONE, 1),
    (2, 40, 80, 30, 29, (3, 3), ONE, ONE, ONE, 1),
    (2, 24, 40, 15, 17, (3, 3), (2, 2), ONE, ONE, 1),
    (1, 16, 16, 9, 11, (3, 3), (3, 2), (0, 2), (2, 3), 1),  # phases without taps, padding beyond the kernel's half
    (2, 16, 24, 9, 8, (1, 1), (2, 2), ONE, ONE, 1),
    (1, 36, 20, 4, 31, (1, 7), ONE, (0, 3), ONE, 1),
    (2, 128, 128, 5, 6, (3, 3), ONE, ONE, ONE, 32),  # ResNeXt's narrow groups: 4 channels
    (2, 136, 136, 7, 15, (3, 3), ONE, ONE, ONE, 17),  # and 8, in more than one block
    (1, 20, 20, 9, 17, (3, 3), (2, 2), ONE, ONE, 5),
    (2, 24, 24, 8, 9, (5, 3), (1, 2), (2, 0), (2, 1), 3),
    (1, 32, 32, 6, 7, (3, 5), ONE, (1, 2), ONE, 8),
    (1, 32, 64, 6, 7, (3, 3), ONE, ONE, ONE, 8),
    (1, 64, 96, 8, 7, (3, 3), (2, 2), ONE, ONE, 2),
    (1, 60, 40, 6, 5, (3, 3), ONE, ONE, ONE, 2),  # groups that are no whole vectors
    (1, 18, 18, 7, 6, (2, 2), ONE, ONE, ONE, 18),
    (1, 9, 5, 23, 22, (11, 11), (4, 4), (2, 2), ONE, 1),  # AlexNet's reach
    (2, 80, 17, 3, 3, (3, 3), ONE, (0, 0), ONE, 1),
    (3, 12, 20, 12, 11, (9, 9), (2, 2), (0, 0), ONE, 1),  # primary capsules: dx by scattering
    (2, 34, 24, 7, 6, (5, 4), (1, 2), (0, 1), ONE, 1),
    (2, 40, 24, 35, 35, (3, 3), (2, 2), (0, 0), ONE, 1),  # lines of a stripe that are one run of rows
    (3, 32, 40, 17, 17, (1, 7), ONE, (0, 3), ONE, 1),
    (9, 48, 24, 8, 8, (3, 3), ONE, ONE, ONE, 1),
    (9, 48, 24, 2, 3, (3, 3), ONE, ONE, ONE, 1),  # and rows gathered from them
    (5, 9, 270, 10, 9, (5, 5), (3, 2), (1, 0), (1, 2), 1),
    (40, 65, 12, 9, 9, (7, 7), ONE, (0, 0), ONE, 1),
    (2, 208, 18, 11, 10, (9, 9), (1, 2), (0, 1), ONE, 1),  # taps in blocks
    (2, 3, 64, 40, 70, (7, 7), (2, 2), (3, 3), ONE, 1),  # ImageNet's stem, more pixels than a block
    (3, 6, 40, 33, 34, (11, 11), (4, 4), (2, 2), ONE, 1),  # a kernel row longer than a tile's
    (2, 7, 130, 9, 45, (3, 5), ONE, (1, 2), (2, 1), 1),
]


def shapes(geometry):
    n, k, c, h, w, kernel, stride, padding, dilation, groups = geometry
    size = conv_out_sizes((h, w), kernel, stride, padding, dilation)
    return (n, k, h, w), (c, k // groups, *kernel), (n, c, *size), (stride, padding, dilation, groups)


def forward_args(geometry, variant, dtype=torch.float32):
    x, weight, out, where = shapes(geometry)
    head, tail = cases.forward_head(x[1], variant), cases.forward_tail(out, variant, dtype)
    return (
        cases.on_grid(*x, dtype=dtype),
        cases.weight(*weight, dtype=dtype),
        *head,
        *tail,
        *where,
        variant == "stats",
    )


def backward_args(geometry, variant, needs, dtype=torch.float32, residual=False):
    x, weight, out, where = shapes(geometry)
    source = cases.backward_source(cases.on_grid(*x, dtype=dtype), variant)
    upstream = cases.backward_upstream(out, variant, dtype)
    residual = cases.on_grid(*x, dtype=dtype) if residual else None
    return (*upstream, *source, cases.weight(*weight, dtype=dtype), residual, *where, *needs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_forward(geometry, variant, dtype, backend, poison):
    cases.check("conv2d_fwd", forward_args(geometry, variant, dtype), backend)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz_few_channels(data: st.DataObject) -> None:
    draw = lambda lo, hi: data.draw(st.integers(lo, hi))  # noqa: E731
    kernel, dilation = (draw(1, 9), draw(1, 9)), (draw(1, 2), draw(1, 3))
    padding = draw(0, 4), draw(0, 4)
    size = [max(1, d * (k - 1) + 1 - 2 * p) + draw(0, 40) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    geometry = (draw(1, 3), draw(1, 7), draw(1, 80), *size, kernel, (draw(1, 3), draw(1, 3)), padding, dilation, 1)
    dtype, variant = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(FORWARD))
    cases.check("conv2d_fwd", forward_args(geometry, variant, dtype), "cpu")
    cases.check("conv2d_bwd", backward_args(geometry, "full", (False, True, False), dtype), "cpu")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz_stripes(data: st.DataObject) -> None:
    draw = lambda lo, hi: data.draw(st.integers(lo, hi))  # noqa: E731
    kernel, dilation, padding = (draw(1, 5), draw(1, 5)), (draw(1, 2), draw(1, 2)), (draw(0, 4), draw(0, 4))
    size = [max(1, d * (k - 1) + 1 - 2 * p) + draw(0, 20) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    where = kernel, (draw(1, 3), draw(1, 3)), padding, dilation, 1
    geometry = (draw(1, 5), draw(8, 70), draw(1, 40), *size, *where)
    dtype, variant = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(FORWARD))
    cases.check("conv2d_fwd", forward_args(geometry, variant, dtype), "cpu")
    cases.check("conv2d_bwd", backward_args(geometry, "full", NEEDS[0], dtype), "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[11], GEOMETRIES[-3], GEOMETRIES[-5], GEOMETRIES[-8]])
def test_what_is_not_finite_stays_in_its_windows(geometry, dtype, value, backend) -> None:
    if backend == "unfused":
        pytest.skip("torch's own multiplies what lies beyond a window by zeros")
    x, weight, *rest = forward_args(geometry, "plain", dtype)
    x[0, 0, 5, 7] = value
    with backends.force(backend):
        y = torch.ops.fastcnn.conv2d_fwd(x, weight, *rest)[0]
    expected = F.conv2d(x.double(), weight.double(), None, *rest[7:10])
    torch.testing.assert_close(y.isfinite(), expected.isfinite())
    assert_close(y[y.isfinite()], expected[expected.isfinite()], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", BACKWARD)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_backward(geometry, variant, dtype, backend, poison):
    cases.check("conv2d_bwd", backward_args(geometry, variant, NEEDS[0], dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", BACKWARD)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_weight_gradient(geometry, variant, dtype, backend, poison):
    cases.check("conv2d_bwd", backward_args(geometry, variant, (False, True, False), dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["plain", "full"])
@pytest.mark.parametrize("needs", NEEDS[:3])
def test_backward_adds_a_residual(needs, variant, dtype, backend, poison):
    for geometry in (GEOMETRIES[0], GEOMETRIES[6], *GEOMETRIES[14:22], *GEOMETRIES[-5:]):
        cases.check("conv2d_bwd", backward_args(geometry, variant, needs, dtype, residual=True), backend)


@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[12]])
@pytest.mark.parametrize("needs", NEEDS[1:])
def test_backward_makes_only_what_is_asked(needs, geometry, backend, poison):
    cases.check("conv2d_bwd", backward_args(geometry, "full", needs), backend)


def test_weight_gradient_has_the_weights_memory_format(preferred):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        weight = torch.randn(20, 24, 3, 3).contiguous(memory_format=memory_format).requires_grad_()
        x = torch.randn(2, 24, 6, 7)
        ops.conv2d(x, weight, None, 1, 1).square().sum().backward()
        assert weight.grad.is_contiguous(memory_format=memory_format)
        expected = torch.autograd.grad(F.conv2d(x, weight, None, 1, 1).square().sum(), weight)[0]
        assert_close(weight.grad, expected, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, poison):
    x, *rest = forward_args(GEOMETRIES[2], "epilogue")
    cases.check("conv2d_fwd", (cases.laid_out(x, layout), *rest), backend)


def test_half_on_the_reference():
    cases.check("conv2d_fwd", forward_args(GEOMETRIES[0], "epilogue", torch.float16), "reference")


def test_opcheck(backend):
    cases.check_opcheck("conv2d_fwd", forward_args(GEOMETRIES[0], "epilogue"), backend)
    cases.check_opcheck("conv2d_bwd", backward_args(GEOMETRIES[0], "full", NEEDS[0]), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_public_function(geometry, dtype, preferred):
    x, weight, _, where = shapes(geometry)
    tensors = [t.to(dtype) for t in (torch.randn(x), cases.weight(*weight), torch.randn(weight[0]))]
    cases.compare_gradients(lambda *t: ops.conv2d(*t, *where), lambda *t: F.conv2d(*t, *where), tensors, dtype)


def test_gradcheck():
    sizes = ((2, 4, 5, 4), (6, 2, 3, 2), (6,))
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]
    with backends.force("reference"):
        assert torch.autograd.gradcheck(lambda *t: ops.conv2d(*t, (2, 1), 1, (1, 2), 2), tensors)


X = torch.randn(2, 8, 9, 7)
BAD = [
    ((X, torch.randn(4, 7, 3, 3)), {}, r"weight: got shape \[4, 7, 3, 3\], expected \[C, 8, R, S\]"),
    ((X, torch.randn(4, 4, 3, 3)), {"groups": 3}, "groups: got 3, expected a divisor of x's 8 channels"),
    ((X, torch.randn(3, 4, 3, 3)), {"groups": 2}, r"weight: got shape \[3, 4, 3, 3\], expected \[C, 4, R, S\] with C"),
    ((X, torch.randn(4, 8, 3)), {}, r"weight: got shape \[4, 8, 3\]"),
    ((X, torch.randn(4, 8, 0, 3)), {}, r"weight: got shape \[4, 8, 0, 3\]"),
    ((X, torch.randn(4, 8, 10, 3)), {}, "x: got 9 x 7 pixels before weight"),
]


@pytest.mark.parametrize(("args", "options", "message"), BAD)
def test_bad_input(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.conv2d(*args, **options)
