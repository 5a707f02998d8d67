"""What the backend says it cannot do."""

from __future__ import annotations

import inspect

import pytest
import torch

import fastcnn.ops  # noqa: F401  (registers the references)
from fastcnn import backends
from fastcnn import triton as backend
from fastcnn.triton.launch import INTERPRETED

POINTWISE = (torch.randn(1, 1, 1, 1), None, None, 0, None, None, 0, None, (1, 1), False)


def test_float64_is_refused_by_name():
    reason = backend.refuses("affine_act_fwd", (torch.randn(1, 2, 3, 3).double(), None, None, 1, None))
    assert "float32, bfloat16 and float16" in reason
    assert "torch.float64" in reason
    x = torch.randn(1, 2, 3, 3)
    assert "the gradient is torch.float64" in backend.refuses("affine_act_sums", (x.double(), x, None, None, 1, None))


def test_the_cpu_is_for_the_interpreter():
    reason = backend.refuses("pointwise_fwd", (torch.randn(1, 1, 2, 2), *POINTWISE))
    if INTERPRETED:
        assert reason is None
    else:
        assert "TRITON_INTERPRET=1" in reason


def test_the_interpreter_multiplies_no_bfloat16():
    if not INTERPRETED:
        pytest.skip("runs under TRITON_INTERPRET=1, in a process that test_interpreter.py starts")
    x = torch.randn(1, 1, 2, 2, dtype=torch.bfloat16)
    assert "wrongly" in backend.refuses("pointwise_fwd", (x, *POINTWISE))
    assert backend.refuses("affine_act_fwd", (x, None, None, 1, None)) is None


def test_forced_where_it_cannot_run():
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("here it can run")
    with backends.force("triton"), pytest.raises(backends.BackendError, match="TRITON_INTERPRET=1"):
        torch.ops.fastcnn.pointwise_fwd(torch.randn(1, 1, 2, 2), *POINTWISE)


def test_the_dispatcher_runs_it(device):
    x = torch.randn(1, 1, 2, 2).to(device)
    args = (POINTWISE[0].to(device), *POINTWISE[1:])
    with backends.force("triton"):
        y = torch.ops.fastcnn.pointwise_fwd(x, *args)[0]
    assert torch.allclose(y, x * args[0])


def test_every_primitive_has_the_reference_signature():
    for name in set(backend.__all__) - {"refuses", "unavailable"}:
        assert inspect.signature(getattr(backend, name)) == inspect.signature(backends.REFERENCES[name]), name
