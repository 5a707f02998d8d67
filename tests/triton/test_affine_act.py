"""The passes over memory at the ends of a chain."""

from __future__ import annotations

import pytest
import torch

from fastcnn.ops.activations import AFTER_RESIDUAL, KNOWN_FROM_OUTPUT
from tests.ops.cases import LAYOUTS, affine, on_grid
from tests.triton.compare import DTYPES, check, image

SHAPES = ((1, 1, (1, 1)), (2, 3, (5, 7)), (2, 17, (9, 4)), (1, 24, (3, 11)), (3, 300, (7, 7)))


@pytest.mark.parametrize("act", range(5))
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((s, torch.float32) for s in SHAPES), *((s, d) for s in SHAPES[1:3] for d in DTYPES[1:])],
    ids=str,
)
def test_every_activation(shape, act, dtype, device):
    n, c, size = shape
    y, grad = image(n, c, size, dtype), on_grid(n, c, *size, dtype=dtype)
    check("affine_act_fwd", (y, *affine(c), act, grad), device)
    check("affine_act_sums", (grad, y, *affine(c), act, torch.randn(c) / 4), device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_what_is_optional(layout, device):
    y, grad = image(2, 17, (5, 6), torch.float32, layout), image(2, 17, (5, 6), torch.float32, layout)
    check("affine_act_fwd", (y, None, affine(17)[1], 3, None), device)
    check("affine_act_fwd", (y, affine(17)[0], None, 0, grad), device)
    check("affine_act_sums", (grad, y, None, affine(17)[1], 1, None), device)


def test_no_images(device):
    y = image(0, 8, (3, 3), torch.float32)
    check("affine_act_fwd", (y, *affine(8), 1, None), device)
    check("affine_act_sums", (y, y, *affine(8), 1, None), device)


def test_many_tiles(device):
    # Sums of several tiles a program, folded in two levels.
    y, grad = image(2, 32, (120, 151), torch.float32), image(2, 32, (120, 151), torch.float32)
    check("affine_act_sums", (grad, y, *affine(32), 1, torch.randn(32) / 4), device)


@pytest.mark.parametrize("act", range(5))
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_prologue_in_memory(shape, act, device):
    n, c, size = shape
    grad, y, residual = (image(n, c, size, torch.float32) for _ in range(3))
    check("affine_act_dgrad", (grad, y, *affine(c), act, torch.randn(4, c), residual), device)
    check("affine_act_dgrad", (grad, y, None, None, 0, torch.randn(4, c), None), device)
    check("affine_act_dgrad", (grad, y, *affine(c), act, None, None), device)


@pytest.mark.parametrize("act", KNOWN_FROM_OUTPUT)
@pytest.mark.parametrize("layout", ["nhwc", *LAYOUTS])
def test_activation_after_a_residual(act, layout, device):
    for c, size in ((17, (9, 4)), (300, (7, 7)), (32, (60, 75))):
        grad, out, y = (image(2, c, size, torch.float32, layout) for _ in range(3))
        check("affine_act_fwd", (y, *affine(c), act + AFTER_RESIDUAL, out), device)
        check("residual_act_bwd", (grad, out, act, y, torch.randn(c) / 4, True), device)
        check("residual_act_bwd", (grad, out, act, y, None, False), device)


def test_statistics(device):
    for shape in (*SHAPES, (2, 32, (120, 151))):
        n, c, size = shape
        check("channel_statistics", (image(n, c, size, torch.float32),), device)


def test_statistics_far_from_zero(device):
    x = image(2, 24, (40, 33), torch.float32) + 1000
    check("channel_statistics", (x,), device)
