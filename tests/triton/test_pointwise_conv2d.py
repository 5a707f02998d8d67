"""pointwise_fwd and pointwise_bwd."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import BACKWARD, FORWARD, LAYOUTS, NEEDS, weight
from tests.triton.compare import DTYPES, backward_args, check, forward_args, image, out_shape

# n, K, C, (H, W), stride: odd channels, vectors of 1 to 8, one pixel, edges of the 64- and 128-row tiles.
SHAPES = (
    (1, 1, 1, (1, 1), (1, 1)),
    (2, 3, 7, (5, 3), (1, 1)),
    (2, 17, 33, (7, 9), (2, 2)),
    (1, 24, 144, (8, 8), (1, 1)),
    (3, 72, 20, (13, 5), (2, 1)),
    (1, 130, 136, (5, 13), (1, 1)),
)
ALL = (True, True, True)


def arguments(variant, n, k, c, size, stride, dtype, needs=None, layout="nhwc", residual=False):
    x, w = image(n, k, size, dtype, layout), weight(c, k, 1, 1)
    shape = out_shape(x, c, (1, 1), stride, (0, 0), (1, 1))
    if needs is None:
        return forward_args(x, w, variant, shape, stride)
    other = image(n, k, size, dtype) if residual else None
    return backward_args(x, w, variant, shape, needs, other, stride)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, variant, dtype, device):
    check("pointwise_fwd", arguments(variant, *shape, dtype), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", BACKWARD)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape, variant, dtype, device):
    check("pointwise_bwd", arguments(variant, *shape, dtype, ALL), device)


@pytest.mark.parametrize("needs", NEEDS[:2])
def test_backward_adds_a_residual(needs, device):
    for shape in SHAPES:
        check("pointwise_bwd", arguments("full", *shape, torch.float32, needs, residual=True), device)


@pytest.mark.parametrize("needs", NEEDS)
def test_backward_of_what_is_needed(needs, device):
    check("pointwise_bwd", arguments("full", *SHAPES[2], torch.float32, needs), device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_layouts(layout, stride, device):
    shape = (2, 17, 12, (6, 5), stride)
    check("pointwise_fwd", arguments("prologue", *shape, torch.float32, layout=layout), device)
    check("pointwise_bwd", arguments("full", *shape, torch.float32, ALL, layout), device)


def test_no_images(device):
    shape = (0, 8, 16, (4, 4), (1, 1))
    check("pointwise_fwd", arguments("epilogue", *shape, torch.float32), device)
    check("pointwise_bwd", arguments("full", *shape, torch.float32, ALL), device)


def test_large_tiles(device):
    shape = (2, 16, 40, (96, 90), (1, 1))  # 135 tiles of 128 rows, 16 splits of the weight gradient
    check("pointwise_fwd", arguments("stats", *shape, torch.float32), device)
    check("pointwise_bwd", arguments("full", *shape, torch.float32, ALL), device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "c"), [(96, 24), (256, 64), (160, 960), (728, 728)])
def test_model_layers(k, c, dtype, gpu):
    shape = (8, k, c, (28, 28), (1, 1))
    for variant in ("prologue", "epilogue", "stats"):
        check("pointwise_fwd", arguments(variant, *shape, dtype), gpu)
    check("pointwise_bwd", arguments("full", *shape, dtype, ALL), gpu)
