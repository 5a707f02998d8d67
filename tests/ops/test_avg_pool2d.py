"""Average pooling with its prologue against the float64 reference, and the public function against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastcnn import nn as fnn
from fastcnn.ops import avg_pool2d
from tests.ops.cases import (
    DTYPES,
    LAYOUTS,
    NONE,
    RELU,
    affine,
    check,
    check_opcheck,
    compare_gradients,
    laid_out,
    on_grid,
)

SHAPES = [(1, 1, 2, 2), (2, 7, 9, 6), (1, 33, 12, 17), (3, 64, 5, 5), (0, 4, 6, 6)]
# kernel, stride, padding, counts_padding
WINDOWS = [((2, 2), (2, 2), (0, 0), True), ((3, 3), (1, 1), (1, 1), False), ((3, 2), (1, 2), (1, 0), True)]


def fits(shape: tuple[int, ...], window: tuple) -> bool:
    return all(shape[2 + i] + 2 * window[2][i] >= window[0][i] for i in (0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prologue", [False, True])
def test_primitives(backend, poison, dtype, window, shape, prologue):
    if not fits(shape, window):
        pytest.skip("the window is larger than the image")
    x, channels = on_grid(*shape, dtype=dtype), shape[1]
    head = (*affine(channels), RELU) if prologue else (None, None, NONE)
    check("avg_pool2d_fwd", (x, *head, *window), backend)
    grad = torch.randn_like(F.avg_pool2d(x.float(), *window[:3])).to(dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    mean = torch.randn(channels) if prologue else None
    for need_sums in (False, True):
        check("avg_pool2d_bwd", (grad, x, *head, mean, *window, need_sums), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    x = laid_out(on_grid(2, 19, 6, 8), layout)
    check("avg_pool2d_fwd", (x, *affine(19), RELU, *WINDOWS[0]), backend)
    grad = laid_out(on_grid(2, 19, 3, 4), layout)
    check("avg_pool2d_bwd", (grad, x, *affine(19), RELU, torch.randn(19), *WINDOWS[0], True), backend)


@pytest.mark.parametrize("window", WINDOWS)
def test_is_torchs(preferred, window):
    def plain(x):
        return F.avg_pool2d(x, *window[:3], False, window[3])

    for dtype in DTYPES:
        x = torch.randn(2, 5, 7, 6).to(dtype)
        compare_gradients(lambda t: avg_pool2d(t, *window), plain, (x,), dtype)


def test_opcheck(backend):
    if backend == "unfused":
        pytest.skip("the unfused backend has no pooling")
    x = on_grid(2, 5, 6, 6)
    check_opcheck("avg_pool2d_fwd", (x, *affine(5), RELU, *WINDOWS[0]), backend)
    check_opcheck("avg_pool2d_bwd", (on_grid(2, 5, 3, 3), x, *affine(5), RELU, None, *WINDOWS[0], True), backend)


@pytest.mark.parametrize("options", [{}, {"ceil_mode": True}, {"divisor_override": 3}, {"count_include_pad": False}])
def test_layer(options):
    x = torch.randn(2, 3, 8, 7)
    ours, stock = fnn.AvgPool2d(3, 2, 1, **options), torch.nn.AvgPool2d(3, 2, 1, **options)
    torch.testing.assert_close(ours(x), stock(x))
    torch.testing.assert_close(ours(x[0]), stock(x[0]))
