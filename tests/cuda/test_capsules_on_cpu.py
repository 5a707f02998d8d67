"""The CUDA capsule routing's logic, without a GPU: as test_on_cpu.py."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from tests.cuda import cpu_runner
from tests.cuda.capsule_cases import CASES, Case, arguments, check, reference

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler with sanitizers"
)
PRIMITIVES = ("capsule_routing_fwd", "capsule_routing_bwd")


@pytest.mark.parametrize("primitive", PRIMITIVES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case, primitive):
    args = arguments(primitive, case)
    check(primitive, case, getattr(cpu_runner, primitive)(*args), reference(primitive, args))


@pytest.mark.parametrize("primitive", PRIMITIVES)
@pytest.mark.parametrize("case", [c for c in CASES if c.sizes[1] >= 33], ids=str)
def test_plans_of_a_large_gpu(case, primitive, monkeypatch):
    monkeypatch.setattr(cpu_runner, "MULTIPROCESSORS", 132)
    args = arguments(primitive, case)
    check(primitive, case, getattr(cpu_runner, primitive)(*args), reference(primitive, args))


def test_more_input_capsules_than_fit_at_once(monkeypatch):
    case = Case((9, 40, 130, 2, 4), iterations=2)
    args = arguments("capsule_routing_fwd", case)
    expected = reference("capsule_routing_fwd", args)
    for shared_bytes in (163 * 1024, 16 * 1024):
        monkeypatch.setattr(cpu_runner, "SHARED_BYTES", shared_bytes)
        check("capsule_routing_fwd", case, cpu_runner.capsule_routing_fwd(*args), expected)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-15, 1e15])
def test_extreme_inputs_stay_finite_and_right(value):
    u, weight = torch.full((3, 6, 4), value), torch.ones(6, 5, 4, 3)
    args = (u, weight, None, 3, False)
    outputs = cpu_runner.capsule_routing_fwd(*args)
    expected = tuple(t.float() for t in reference("capsule_routing_fwd", args))  # 1e-59 is 0
    check("capsule_routing_fwd", Case((3, 6, 4, 5, 3)), outputs, expected)
    gradients = cpu_runner.capsule_routing_bwd(torch.ones(3, 5, 3), u, weight, outputs[1], False, False, True, True)
    assert all(t.isfinite().all() for t in gradients)


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_over_no_images_are_zero(detach):
    u, weight, grad, s = torch.empty(0, 3, 4), torch.ones(3, 2, 4, 5), torch.empty(0, 2, 5), torch.empty(3, 0, 2, 5)
    du, dw, dbias = cpu_runner.capsule_routing_bwd(grad, u, weight, s, False, detach, True, True)
    assert du.shape == (0, 3, 4)
    assert torch.equal(dw, torch.zeros(3, 2, 4, 5))
    assert torch.equal(dbias, torch.zeros(2, 5))


@pytest.mark.parametrize("shared_bytes", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize(
    "sizes",
    [
        (100, 1152, 8, 10, 16, 3),
        (1, 1152, 8, 10, 16, 3),
        (100000, 1152, 8, 10, 16, 20),
        (100, 512, 8, 128, 16, 3),
        (100, 512, 16, 64, 16, 3),
    ],
    ids=str,
)
def test_plans_stay_within_shared_memory(sizes, shared_bytes):
    for primitive in PRIMITIVES:
        used = cpu_runner.planned_capsule_bytes(primitive, sizes, shared_bytes)
        assert used is None or used <= shared_bytes


@pytest.mark.parametrize(
    ("sizes", "primitive", "message"),
    [
        ((2, 3, 4, 129, 16), "capsule_routing_fwd", "more than 2048 outputs"),
        ((2, 3, 17, 4, 4), "capsule_routing_bwd", "an in_dim of at most 16"),
        ((2, 3, 9, 65, 16), "capsule_routing_bwd", "no threads for so many outputs"),
    ],
)
def test_what_is_out_of_range_is_an_error(sizes, primitive, message):
    args = arguments(primitive, Case(sizes, iterations=1))
    with pytest.raises(RuntimeError, match=message):
        getattr(cpu_runner, primitive)(*args)
