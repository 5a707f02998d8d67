"""The CUDA kernels' logic, without a GPU: compiled for the CPU stand-in under AddressSanitizer and UBSan.

Every case runs with threads in ascending and in descending order and must give the same bits (driver.cpp).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
import torch

from tests.cuda import cpu_runner
from tests.cuda.cases import arguments, check, error, reference
from tests.cuda.shapes import DEPTHWISE, MODEL_LAYERS, PRODUCTS, SEPARABLE, STATS

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler with sanitizers"
)


def _run(primitive, shape):
    args = arguments(primitive, shape)
    outputs = getattr(cpu_runner, primitive)(*args)
    check(primitive, shape, outputs, reference(primitive, args))
    return args, outputs


@pytest.mark.parametrize("shape", [*DEPTHWISE, *STATS], ids=str)
def test_depthwise_fwd_equals_reference(shape):
    _run("depthwise_fwd", shape)


@pytest.mark.parametrize("shape", DEPTHWISE, ids=str)
def test_depthwise_bwd_equals_reference(shape):
    _run("depthwise_bwd", shape)


@pytest.mark.parametrize("shape", SEPARABLE, ids=str)
def test_separable_fwd_equals_reference(shape):
    _run("separable_fwd", shape)


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_tile_of_the_separable_product(name):
    m, shape = PRODUCTS[name]
    args = arguments("separable_fwd", shape)
    check("separable_fwd", shape, cpu_runner.separable_fwd(*args, m=m), reference("separable_fwd", args))


@pytest.mark.parametrize("primitive", ["depthwise_fwd", "separable_fwd"])
def test_variance_keeps_its_digits_when_mean_is_a_thousand_times_the_deviation(primitive):
    shape = next(s for s in [*STATS, *SEPARABLE] if s.mean)
    _, (y, _, var) = _run(primitive, shape)
    exact = y.double().var((0, 2, 3), unbiased=False)
    assert error(var, exact) < 1e-4


def test_outputs_that_are_not_needed_change_nothing():
    args = arguments("depthwise_bwd", DEPTHWISE[0])
    dx, dw, _ = cpu_runner.depthwise_bwd(*args)
    only_dx = cpu_runner.depthwise_bwd(*args[:-3], True, False, False)
    only_dw = cpu_runner.depthwise_bwd(*args[:-3], False, True, False)
    assert torch.equal(only_dx[0], dx)
    assert torch.equal(only_dw[1], dw)
    assert only_dx[1] is None
    assert only_dw[0] is None


def test_float32_weights_with_bfloat16_images():
    shape = replace(DEPTHWISE[4], h=6, w=9)
    args = list(arguments("depthwise_fwd", shape))
    args[1] = args[1].float()
    check("depthwise_fwd", shape, cpu_runner.depthwise_fwd(*args), reference("depthwise_fwd", args))


@pytest.mark.parametrize("shared_bytes", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("shape", [*MODEL_LAYERS, *DEPTHWISE], ids=str)
def test_plans_stay_within_shared_memory(shape, shared_bytes):
    for primitive in ("depthwise_fwd", "depthwise_bwd", "separable_fwd"):
        used = cpu_runner.planned_shared_bytes(primitive, shape, shared_bytes)
        assert used is None or used <= shared_bytes


def test_a_shape_that_no_tile_fits_is_an_error():
    shape = replace(DEPTHWISE[14], h=300, w=300, padding=(150, 150), dilation=(10, 10))
    with pytest.raises(RuntimeError, match="no tile of this shape fits in shared memory"):
        cpu_runner.depthwise_fwd(*arguments("depthwise_fwd", shape))
