"""The passes over memory at the ends of a chain, on every backend."""

from __future__ import annotations

import pytest
import torch

from fastcnn.ops.activations import AFTER_RESIDUAL, KNOWN_FROM_OUTPUT
from tests.ops import cases
from tests.ops.cases import CHANNELS, DTYPES, LAYOUTS, affine, laid_out, on_grid

SIZES = ((1, 1), (5, 7), (41, 30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", range(5))
@pytest.mark.parametrize("size", SIZES)
def test_every_activation(size, act, dtype, backend, poison):
    grad, y, residual = (on_grid(2, 33, *size, dtype=dtype) for _ in range(3))
    scale, shift = affine(33)
    for code in (act, act + AFTER_RESIDUAL):
        cases.check("affine_act_fwd", (y, scale, shift, code, residual), backend)
    cases.check("affine_act_sums", (grad, y, scale, shift, act, torch.randn(33) / 4), backend)
    cases.check("affine_act_dgrad", (grad, y, scale, shift, act, torch.randn(4, 33), residual), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_around_vector_widths(channels, dtype, backend, poison):
    grad, out, y = (on_grid(2, channels, 9, 7, dtype=dtype) for _ in range(3))
    cases.check("affine_act_fwd", (y, None, None, 1 + AFTER_RESIDUAL, out), backend)
    cases.check("affine_act_dgrad", (grad, y, None, None, 0, torch.randn(4, channels), None), backend)
    cases.check("channel_statistics", (y,), backend)
    for act in KNOWN_FROM_OUTPUT:
        cases.check("residual_act_bwd", (grad, out, act, y, torch.randn(channels) / 4, True), backend)
        cases.check("residual_act_bwd", (grad, out, act, y, None, False), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, poison):
    grad, out, y = (laid_out(on_grid(2, 17, 5, 6), layout) for _ in range(3))
    cases.check("affine_act_fwd", (y, *affine(17), 1, out), backend)
    cases.check("affine_act_dgrad", (grad, y, *affine(17), 1, torch.randn(4, 17), out), backend)
    cases.check("residual_act_bwd", (grad, out, 1, y, None, True), backend)
    cases.check("channel_statistics", (y,), backend)


def test_statistics_far_from_zero(backend):
    cases.check("channel_statistics", (1000 + torch.randn(2, 24, 40, 33),), backend)


def test_opcheck(backend):
    grad, out, y = (on_grid(2, 17, 5, 6) for _ in range(3))
    cases.check_opcheck("affine_act_fwd", (y, *affine(17), 1 + AFTER_RESIDUAL, out), backend)
    cases.check_opcheck("affine_act_dgrad", (grad, y, *affine(17), 1, torch.randn(4, 17), out), backend)
    cases.check_opcheck("residual_act_bwd", (grad, out, 1, y, None, True), backend)
    cases.check_opcheck("channel_statistics", (y,), backend)
