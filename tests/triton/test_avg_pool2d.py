"""avg_pool2d_fwd and avg_pool2d_bwd."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import LAYOUTS, NONE, RELU, SILU, affine
from tests.triton.compare import DTYPES, check, image, out_shape

SHAPES = ((1, 1, (2, 3)), (2, 7, (9, 6)), (1, 33, (7, 12)), (2, 24, (5, 5)), (1, 300, (4, 3)))
# kernel, stride, padding, counts_padding
WINDOWS = (
    ((2, 2), (2, 2), (0, 0), True),
    ((3, 3), (1, 1), (1, 1), False),
    ((3, 2), (1, 2), (1, 0), True),
    ((2, 2), (3, 4), (1, 1), False),  # pixels in no window
)


def arguments(shape, window, dtype, act, layout="nhwc") -> tuple[tuple, tuple]:
    """Arguments of the forward, and of the backward but for need_sums."""
    n, c, size = shape
    x, head = image(n, c, size, dtype, layout), (None, None, NONE) if act == NONE else (*affine(c), act)
    _, _, *out = out_shape(x, c, *window[:3], (1, 1))
    return (x, *head, *window), (image(n, c, out, dtype, layout), x, *head, torch.randn(c) / 4, *window)


@pytest.mark.parametrize("act", [NONE, RELU, SILU])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(
    ("shape", "dtype"), [*((s, torch.float32) for s in SHAPES), *((SHAPES[1], d) for d in DTYPES[1:])], ids=str
)
def test_values_and_gradients(shape, dtype, window, act, device):
    forward, backward = arguments(shape, window, dtype, act)
    check("avg_pool2d_fwd", forward, device)
    check("avg_pool2d_bwd", (*backward, True), device)
    check("avg_pool2d_bwd", (*backward, False), device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    forward, backward = arguments((2, 19, (6, 8)), WINDOWS[0], torch.float32, RELU, layout)
    check("avg_pool2d_fwd", forward, device)
    check("avg_pool2d_bwd", (*backward, True), device)


def test_a_backward_that_reads_no_input(device):
    _, (grad, x, *rest) = arguments(SHAPES[1], WINDOWS[1], torch.float32, NONE)
    check("avg_pool2d_bwd", (grad, grad.new_empty(1).expand(x.shape), *rest, False), device)


def test_no_images(device):
    forward, backward = arguments((0, 4, (6, 6)), WINDOWS[0], torch.float32, RELU)
    check("avg_pool2d_fwd", forward, device)
    check("avg_pool2d_bwd", (*backward, True), device)


def test_many_tiles(device):
    # Sums of several tiles a program, folded in two levels.
    forward, backward = arguments((2, 32, (120, 151)), WINDOWS[0], torch.float32, RELU)
    check("avg_pool2d_fwd", forward, device)
    check("avg_pool2d_bwd", (*backward, True), device)
