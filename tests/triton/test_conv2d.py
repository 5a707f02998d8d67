"""conv2d_fwd and conv2d_bwd."""

from __future__ import annotations

import pytest
import torch

from fastcnn.triton.implicit_gemm import bundled, tap_matrices, weight_of_taps
from tests.ops.cases import BACKWARD, FORWARD, LAYOUTS, NEEDS, weight
from tests.triton.compare import DTYPES, backward_args, check, forward_args, image, out_shape

ONE = (1, 1)
# n, K, C, (H, W), kernel, stride, padding, dilation, groups
SHAPES = (
    (1, 1, 1, (1, 1), (3, 3), ONE, ONE, ONE, 1),
    (2, 3, 32, (13, 15), (3, 3), (2, 2), ONE, ONE, 1),  # MobileNet-v2's stem
    (1, 3, 32, (13, 14), (3, 3), (2, 2), (0, 0), ONE, 1),  # Xception's
    (1, 3, 20, (15, 14), (7, 7), (2, 2), (3, 3), ONE, 1),  # ResNet's
    (1, 32, 64, (9, 8), (3, 3), ONE, (0, 0), ONE, 1),
    (2, 24, 40, (7, 5), (3, 3), ONE, ONE, ONE, 1),
    (1, 17, 9, (7, 9), (3, 3), ONE, ONE, (2, 1), 1),
    (1, 33, 17, (8, 9), (3, 3), ONE, ONE, (2, 2), 1),
    (2, 8, 16, (6, 5), (2, 4), (1, 2), (1, 2), ONE, 1),
    (1, 1, 33, (5, 6), (1, 3), ONE, (0, 1), ONE, 1),
    (1, 5, 7, (11, 12), (7, 1), (2, 1), (3, 0), ONE, 1),
    (2, 1, 6, (12, 12), (5, 5), ONE, (2, 2), ONE, 1),
    (1, 130, 136, (5, 4), (2, 1), ONE, (1, 0), ONE, 1),
)
GROUPED = (
    (1, 12, 8, (6, 7), (3, 3), ONE, ONE, ONE, 4),
    (2, 32, 64, (5, 6), (3, 3), (2, 2), ONE, ONE, 8),  # ResNeXt's few channels a group: bundles of two
    (1, 68, 40, (5, 4), (3, 3), ONE, ONE, ONE, 2),
    (2, 17, 17, (6, 5), (3, 3), ONE, ONE, ONE, 17),
    (1, 24, 48, (5, 6), (3, 3), (2, 2), ONE, ONE, 24),
)
# Phases without taps or pixels, strides and dilations that share a factor or do not, padding beyond the kernel.
STRIDED = (
    (2, 9, 8, (9, 8), (1, 1), (2, 2), (0, 0), ONE, 1),
    (1, 3, 8, (10, 9), (2, 2), (3, 3), (0, 0), ONE, 1),
    (1, 5, 4, (8, 8), (4, 4), (4, 4), (0, 0), ONE, 1),
    (1, 4, 6, (11, 12), (3, 3), (2, 2), (2, 2), (2, 2), 1),
    (1, 4, 6, (13, 12), (3, 4), (4, 6), (1, 3), (2, 4), 1),
    (1, 4, 6, (13, 12), (3, 3), (2, 3), (3, 2), (3, 2), 1),
    (1, 4, 6, (2, 1), (3, 3), (4, 3), (2, 1), ONE, 1),
    (1, 4, 6, (4, 5), (3, 3), (2, 2), (5, 4), ONE, 1),
)
ALL = (True, True, True)


def arguments(
    variant, n, k, c, size, kernel, stride, padding, dilation, groups, dtype, needs=None, layout="nhwc", residual=False
):  # fmt: skip
    x, w = image(n, k, size, dtype, layout), weight(c, k // groups, *kernel)
    shape = out_shape(x, c, kernel, stride, padding, dilation)
    if needs is None:
        return forward_args(x, w, variant, shape, stride, padding, dilation, groups)
    other = image(n, k, size, dtype) if residual else None
    return backward_args(x, w, variant, shape, needs, other, stride, padding, dilation, groups)


@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("shape", SHAPES + GROUPED, ids=str)
def test_forward(shape, variant, device):
    check("conv2d_fwd", arguments(variant, *shape, torch.float32), device)


@pytest.mark.parametrize("variant", BACKWARD)
@pytest.mark.parametrize("shape", SHAPES + GROUPED, ids=str)
def test_backward(shape, variant, device):
    check("conv2d_bwd", arguments(variant, *shape, torch.float32, ALL), device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:9:2] + GROUPED[:2], ids=str)
def test_half_precision(shape, dtype, device):
    for variant in ("prologue", "epilogue", "stats"):
        check("conv2d_fwd", arguments(variant, *shape, dtype), device)
    check("conv2d_bwd", arguments("full", *shape, dtype, ALL), device)


@pytest.mark.parametrize("shape", STRIDED, ids=str)
def test_every_phase_of_a_stride(shape, device):
    check("conv2d_fwd", arguments("prologue", *shape, torch.float32), device)
    check("conv2d_bwd", arguments("full", *shape, torch.float32, ALL), device)


@pytest.mark.parametrize("needs", NEEDS[:2])
def test_backward_adds_a_residual(needs, device):
    for shape in SHAPES[:4] + GROUPED[:2] + STRIDED[:3]:
        check("conv2d_bwd", arguments("full", *shape, torch.float32, needs, residual=True), device)


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("shape", [SHAPES[1], GROUPED[1]], ids=str)
def test_backward_of_what_is_needed(shape, needs, device):
    check("conv2d_bwd", arguments("full", *shape, torch.float32, needs), device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 4])
def test_layouts(layout, groups, device):
    shape = (2, 20, 12, (6, 5), (3, 3), (2, 1), ONE, ONE, groups)
    check("conv2d_fwd", arguments("prologue", *shape, torch.float32, layout=layout), device)
    check("conv2d_bwd", arguments("full", *shape, torch.float32, ALL, layout), device)


def test_no_images(device):
    shape = (0, 8, 16, (4, 4), (3, 3), ONE, ONE, ONE, 1)
    check("conv2d_fwd", arguments("epilogue", *shape, torch.float32), device)
    check("conv2d_bwd", arguments("full", *shape, torch.float32, ALL), device)


@pytest.mark.parametrize("stride", [ONE, (2, 2)], ids=str)
def test_large_tiles(stride, device):
    # 137 tiles of 128 rows, 17 splits of the weight gradient (stride 2: 4 of the quarter of the pixels)
    shape = (2, 8, 12, (96, 90), (1, 2), stride, (0, 1), ONE, 1)
    check("conv2d_fwd", arguments("stats", *shape, torch.float32), device)
    check("conv2d_bwd", arguments("full", *shape, torch.float32, ALL), device)


def test_bundles():
    sizes = {(8, 8): 8, (8, 1): 1, (12, 4): 4, (32, 8): 4, (64, 32): 8, (64, 4): 1, (17, 17): 1, (48, 24): 8}
    assert {(c, g): bundled(torch.empty(c, c // g, 1, 1), g) for c, g in sizes} == sizes


@pytest.mark.parametrize(("k", "c", "groups", "bundle"), [(12, 8, 4, 2), (6, 6, 6, 3), (8, 16, 2, 1), (5, 7, 1, 1)])
def test_weights_of_bundles(k, c, groups, bundle):
    w = weight(c, k // groups, 2, 3)
    taps = tap_matrices(w, groups, bundle, w)
    assert taps.shape == (groups // bundle, bundle * (c // groups), 2, 3, bundle * (k // groups))
    assert taps.sum().isclose(w.sum())
    assert torch.equal(weight_of_taps(taps, bundle), w)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (8, 3, 64, (112, 112), (7, 7), (2, 2), (3, 3), ONE, 1),
        (8, 3, 32, (112, 112), (3, 3), (2, 2), ONE, ONE, 1),
        (8, 64, 64, (56, 56), (3, 3), ONE, ONE, ONE, 1),
        (8, 128, 128, (56, 56), (3, 3), (2, 2), ONE, ONE, 1),
        (8, 256, 256, (14, 14), (3, 3), ONE, (2, 2), (2, 2), 1),
        (8, 128, 128, (28, 28), (3, 3), ONE, ONE, ONE, 32),
    ],
    ids=str,
)
def test_model_layers(shape, dtype, gpu):
    for variant in ("prologue", "epilogue", "stats"):
        check("conv2d_fwd", arguments(variant, *shape, dtype), gpu)
    check("conv2d_bwd", arguments("full", *shape, dtype, ALL), gpu)
