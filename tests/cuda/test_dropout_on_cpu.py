"""The CUDA dropout's logic, without a GPU: as test_on_cpu.py."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from fastcnn.ops.dropout import CHANNEL, ELEMENT
from tests.cuda import cpu_runner
from tests.cuda.dropout_cases import (
    BF16,
    CASES,
    F16,
    F32,
    SHAPES,
    UNITS,
    Case,
    arguments,
    check,
    kept_like,
    placed,
    reference,
    seed_of,
)

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler with sanitizers"
)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1], ids=str)
def test_masks_bit_for_bit(shape, unit, dtype):
    for nhwc in (True, False) if len(shape) == 4 else (True,):
        x = placed(torch.ones(torch.Size(shape).numel()), Case(shape, nhwc=nhwc, dtype=dtype))
        out = cpu_runner.dropout_fwd(x, None, 0, None, 0.4, 3.0, unit, seed_of())
        assert torch.equal(out, kept_like(x, None, 0.4, unit, seed_of()).to(dtype) * 3)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_of_every_probability(shape, p):
    for bias in (None, torch.zeros(shape[1] if len(shape) == 4 else shape[-1])):
        x = placed(torch.ones(torch.Size(shape).numel()), Case(shape, dtype=BF16))
        out = cpu_runner.dropout_fwd(x, bias, 0, None, p, 3.0, ELEMENT, seed_of(5, 7))
        assert torch.equal(out, kept_like(x, bias, p, ELEMENT, seed_of(5, 7)).to(BF16) * 3)


@pytest.mark.parametrize("primitive", ["dropout_fwd", "dropout_bwd"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case, primitive):
    args = arguments(primitive, case)
    check(primitive, case, getattr(cpu_runner, primitive)(*args), reference(primitive, args))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plans_of_a_large_gpu(case, monkeypatch):
    monkeypatch.setattr(cpu_runner, "MULTIPROCESSORS", 132)
    args = arguments("dropout_bwd", case)
    check("dropout_bwd", case, cpu_runner.dropout_bwd(*args), reference("dropout_bwd", args))


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_what_is_dropped_is_zero_even_a_nan(p, unit):
    x = placed(torch.full((3 * 33 * 20,), float("nan")), Case((3, 33, 4, 5), dtype=BF16))
    bias, how = torch.full((33,), float("nan")), (p, 2.0, unit, seed_of())
    stay = kept_like(x, bias, p, unit, seed_of())
    for out in (
        cpu_runner.dropout_fwd(x, bias, 3, None, *how),
        cpu_runner.dropout_bwd(x, x, bias, 3, *how, True)[0],
    ):
        assert torch.equal(out.isnan(), stay)
        assert torch.equal(out == 0, ~stay)
    assert p < 1 or torch.equal(cpu_runner.dropout_bwd(x, x, bias, 3, *how, True)[1], torch.zeros(33))


@pytest.mark.parametrize("past", [0, 1])
@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_in_place(unit, past):
    case = Case((3, 33, 4, 5), dtype=BF16, past=past)
    x, *how = arguments("dropout_fwd", case)
    expected = cpu_runner.dropout_fwd(x, None, 0, None, 0.5, 2.0, unit, how[-1])
    cpu_runner.dropout_inplace(x, 0.5, 2.0, unit, how[-1])
    assert torch.equal(x, expected)


def test_a_bias_gradient_over_no_rows_is_zero():
    x, bias = torch.empty(0, 8), torch.ones(8)
    dx, dbias = cpu_runner.dropout_bwd(x, None, bias, 0, 0.5, 2.0, CHANNEL, seed_of(), True)
    assert dx.shape == (0, 8)
    assert torch.equal(dbias, torch.zeros(8))
