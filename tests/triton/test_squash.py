"""squash of rows of any length, at zero and at the ends of the range."""

from __future__ import annotations

import pytest
import torch

import fastcnn.ops  # noqa: F401  (registers the references)
from fastcnn import backends
from fastcnn import triton as backend
from fastcnn.triton.launch import INTERPRETED, MAX_VECTOR
from tests.tolerances import assert_close
from tests.triton.compare import DTYPES, check, on

SHAPES = ((1,), (1, 1), (3, 8), (2, 7, 5), (33, 17), (300, 8), (2, 3000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows(shape, dtype, device):
    s, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    check("squash_fwd", (s,), device)
    check("squash_bwd", (grad, s), device)


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-20, 1e-3, 1.0, 1e3, 1e19, 1e30, 3e37])
def test_extremes(scale, device):
    s = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]) * scale
    grad = torch.tensor([[1.0, 2.0, -1.0]]).expand(3, 3).contiguous()
    placed = on(device, (grad, s))
    v, ds = backend.squash_fwd(placed[1]).cpu(), backend.squash_bwd(*placed).cpu()
    assert torch.equal(v[1], torch.zeros(3))
    assert torch.equal(ds[1], torch.zeros(3))
    assert v.isfinite().all()
    assert ds.isfinite().all()
    if scale > 1e-38:  # below, float32 has no digits
        exact = grad.double(), s.double()
        assert_close(v, backends.REFERENCES["squash_fwd"](exact[1]), torch.float32)
        assert_close(ds, backends.REFERENCES["squash_bwd"](*exact), torch.float32)


def test_no_rows(device):
    s = torch.empty(0, 8, device=device)
    assert backend.squash_fwd(s).shape == backend.squash_bwd(s, s).shape == (0, 8)


def test_what_it_refuses():
    s = torch.zeros(2, MAX_VECTOR + 1)
    if INTERPRETED:
        assert f"these have {MAX_VECTOR + 1}" in backend.refuses("squash_fwd", (s,))
    assert "the gradient is torch.float64" in backend.refuses("squash_bwd", (s.double(), s))
