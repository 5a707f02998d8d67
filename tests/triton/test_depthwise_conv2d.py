"""depthwise_fwd and depthwise_bwd."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import BACKWARD, FORWARD, LAYOUTS, NEEDS, weight
from tests.triton.compare import DTYPES, backward_args, check, forward_args, image, out_shape

# n, K, multiplier, (H, W), kernel, stride, padding, dilation
ONE = (1, 1)
SHAPES = (
    (1, 1, 1, (1, 1), (3, 3), ONE, (1, 1), ONE),
    (2, 3, 1, (5, 9), (3, 3), ONE, (1, 1), ONE),
    (2, 17, 1, (9, 6), (3, 3), (2, 2), (1, 1), ONE),
    (1, 33, 1, (7, 10), (3, 3), ONE, (2, 2), (2, 2)),
    (1, 7, 2, (6, 5), (3, 3), (2, 1), (1, 1), ONE),
    (1, 8, 1, (7, 4), (5, 5), ONE, (2, 2), ONE),
    (1, 5, 1, (8, 8), (5, 5), (2, 2), (2, 2), ONE),
    (1, 3, 1, (9, 7), (7, 7), ONE, (3, 3), ONE),
    (1, 3, 1, (8, 7), (7, 7), (2, 2), (3, 3), ONE),
    (1, 2, 1, (6, 9), (1, 3), ONE, (0, 1), ONE),
    (1, 2, 1, (9, 9), (3, 3), (3, 5), (0, 1), ONE),
)
ALL = (True, True, True)


def arguments(variant, n, k, multiplier, size, kernel, stride, padding, dilation, dtype, needs=None, layout="nhwc"):
    x, w = image(n, k, size, dtype, layout), weight(k * multiplier, 1, *kernel)
    geometry = (stride, padding, dilation)
    shape = out_shape(x, k * multiplier, kernel, *geometry)
    if needs is None:
        return forward_args(x, w, variant, shape, *geometry)
    return backward_args(x, w, variant, shape, needs, *geometry)


@pytest.mark.parametrize("variant", ["prologue", "stats"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, variant, device):
    check("depthwise_fwd", arguments(variant, *shape, torch.float32), device)


@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=str)
def test_forward_variants(shape, variant, device):
    check("depthwise_fwd", arguments(variant, *shape, torch.float32), device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape, device):
    check("depthwise_bwd", arguments("full", *shape, torch.float32, ALL), device)


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]], ids=str)
@pytest.mark.parametrize("variant", BACKWARD)
def test_backward_variants(shape, variant, device):
    check("depthwise_bwd", arguments(variant, *shape, torch.float32, ALL), device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES[2:8:2], ids=str)
def test_half_precision(shape, dtype, device):
    check("depthwise_fwd", arguments("prologue", *shape, dtype), device)
    check("depthwise_bwd", arguments("full", *shape, dtype, ALL), device)


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]], ids=str)
def test_backward_of_what_is_needed(shape, needs, device):
    check("depthwise_bwd", arguments("full", *shape, torch.float32, needs), device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    shape = (2, 17, 1, (5, 6), (3, 3), ONE, (1, 1), ONE)
    check("depthwise_fwd", arguments("prologue", *shape, torch.float32, layout=layout), device)
    check("depthwise_bwd", arguments("full", *shape, torch.float32, ALL, layout), device)


def test_no_images(device):
    shape = (0, 8, 1, (4, 4), (3, 3), ONE, (1, 1), ONE)
    check("depthwise_fwd", arguments("epilogue", *shape, torch.float32), device)
    check("depthwise_bwd", arguments("full", *shape, torch.float32, ALL), device)


def test_a_kernel_of_31(device):
    shape = (1, 2, 1, (9, 5), (31, 31), ONE, (15, 15), ONE)
    check("depthwise_fwd", arguments("prologue", *shape, torch.float32), device)
    check("depthwise_bwd", arguments("full", *shape, torch.float32, ALL), device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [3, 5, 7, 31])
@pytest.mark.parametrize("stride", [1, 2])
def test_model_layers(kernel, stride, dtype, gpu):
    shape = (4, 144, 1, (56, 54), (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), ONE)
    for variant in ("prologue", "epilogue", "stats"):
        check("depthwise_fwd", arguments(variant, *shape, dtype), gpu)
    check("depthwise_bwd", arguments("full", *shape, dtype, ALL), gpu)
