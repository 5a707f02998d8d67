"""separable_fwd (fused and as two kernels) and inverted_residual_fwd."""

from __future__ import annotations

import pytest
import torch

from fastcnn.triton.separable_conv2d import is_fused
from tests.ops.cases import FORWARD, HARDSWISH, LAYOUTS, RELU, SILU, affine, forward_head, forward_tail, weight
from tests.triton.compare import DTYPES, check, image, out_shape

ONE = (1, 1)
# n, K, multiplier, C, (H, W), kernel, stride, padding, dilation
SHAPES = (
    (1, 1, 1, 1, (1, 1), (3, 3), ONE, (1, 1), ONE),
    (2, 3, 1, 7, (5, 9), (3, 3), ONE, (1, 1), ONE),
    (2, 17, 1, 33, (9, 6), (3, 3), (2, 2), (1, 1), ONE),
    (1, 33, 1, 17, (7, 10), (3, 3), ONE, (2, 2), (2, 2)),
    (1, 7, 2, 24, (6, 5), (5, 5), ONE, (2, 2), ONE),
    (1, 40, 1, 160, (8, 17), (3, 3), ONE, (1, 1), ONE),
    (1, 8, 1, 264, (5, 4), (3, 3), ONE, (1, 1), ONE),
    (1, 4, 1, 8, (6, 7), (7, 7), ONE, (3, 3), ONE),
)


def arguments(variant, n, k, multiplier, c, size, kernel, stride, padding, dilation, dtype, layout="nhwc"):
    x, geometry = image(n, k, size, dtype, layout), (stride, padding, dilation)
    weights = weight(k * multiplier, 1, *kernel), weight(c, k * multiplier, 1, 1)
    middle = (None, None, 0) if variant == "plain" else (*affine(k * multiplier), SILU if variant == "bias" else RELU)
    tail = forward_tail(out_shape(x, c, kernel, *geometry), variant, dtype)
    return x, *weights, *forward_head(k, variant), *middle, *tail, *geometry, variant == "stats"


@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_separable(shape, variant, device):
    check("separable_fwd", arguments(variant, *shape, torch.float32), device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES[2:6], ids=str)
def test_half_precision(shape, dtype, device):
    for variant in ("prologue", "epilogue", "stats"):
        check("separable_fwd", arguments(variant, *shape, dtype), device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    check("separable_fwd", arguments("prologue", *SHAPES[2], torch.float32, layout), device)


def test_no_images(device):
    check("separable_fwd", arguments("epilogue", 0, *SHAPES[2][1:], torch.float32), device)


def test_both_ways_are_covered():
    assert [is_fused(s[5][0] * s[5][1], s[3]) for s in SHAPES] == [True] * 6 + [False] * 2


@pytest.mark.parametrize("project", [True, False], ids=["project", "no-project"])
@pytest.mark.parametrize("stride", [ONE, (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inverted_residual(dtype, stride, project, device):
    x, hidden, c = image(2, 12, (7, 6), dtype), 36, 20
    geometry = (stride, (1, 1), ONE)
    shape = out_shape(x, c if project else hidden, (3, 3), *geometry)
    tail = forward_tail(shape, "epilogue", dtype)
    args = (
        x, weight(hidden, 12, 1, 1), weight(hidden, 1, 3, 3), weight(c, hidden, 1, 1) if project else None,
        *forward_head(12, "prologue"), *affine(hidden), HARDSWISH, *affine(hidden), RELU,
        *(tail[:3] if project else (None, None, 0)), tail[3], *geometry,
    )  # fmt: skip
    check("inverted_residual_fwd", args, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "c"), [(96, 24), (144, 32), (960, 320), (64, 128), (728, 728)])
@pytest.mark.parametrize("stride", [1, 2])
def test_model_layers(k, c, stride, dtype, gpu):
    shape = (4, k, 1, c, (28, 30), (3, 3), (stride, stride), (1, 1), ONE)
    for variant in FORWARD:
        check("separable_fwd", arguments(variant, *shape, dtype), gpu)
