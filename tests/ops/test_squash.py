"""squash: values and gradients on every backend, at zero and at the ends of the range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcnn import backends, ops
from tests.ops import cases
from tests.tolerances import assert_close

SHAPES = [(1, 1), (3, 8), (5, 16), (2, 7, 5), (33, 17), (4, 3, 2, 40), (100, 8)]


def plain(s: Tensor) -> Tensor:
    norm = s.norm(dim=-1, keepdim=True)
    return norm.square() / (1 + norm.square()) * s / norm


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_primitives(shape, dtype, backend, poison):
    s, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    cases.require(backend, "squash_fwd")
    with backends.force(backend):
        v, ds = torch.ops.fastcnn.squash_fwd(s), torch.ops.fastcnn.squash_bwd(grad, s)
    exact = s.double().requires_grad_()
    expected = plain(exact)
    expected.backward(grad.double())
    assert v.dtype == ds.dtype == dtype
    assert_close(v, expected, dtype, "squash")
    assert_close(ds, exact.grad, dtype, "gradient")


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-20, 1e-3, 1.0, 1e3, 1e19, 3e37])
def test_extremes(scale, backend):
    cases.require(backend, "squash_fwd")
    s = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]) * scale
    grad = torch.tensor([[1.0, 2.0, -1.0]]).expand(3, 3).contiguous()
    with backends.force(backend):
        v, ds = torch.ops.fastcnn.squash_fwd(s), torch.ops.fastcnn.squash_bwd(grad, s)
    rows = [0, 2]
    exact = s[rows].double().requires_grad_()
    expected = plain(exact)
    expected.backward(grad[rows].double())
    assert torch.equal(v[1], torch.zeros(3))
    assert torch.equal(ds[1], torch.zeros(3))
    assert v.isfinite().all()
    assert ds.isfinite().all()
    if scale > 1e-38:  # below, float32 has no digits
        assert_close(v[rows], expected, torch.float32)
        assert_close(ds[rows], exact.grad, torch.float32)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_public_function(dim, preferred):
    tensors = [torch.randn(4, 8, 6)]
    cases.compare_gradients(
        lambda s: ops.squash(s, dim), lambda s: plain(s.transpose(dim, -1)).transpose(dim, -1), tensors, torch.float32
    )


def test_gradcheck_and_opcheck(backend):
    cases.require(backend, "squash_fwd")
    s = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.squash, s)
    cases.check_opcheck("squash_fwd", (torch.randn(3, 5),), backend)
    cases.check_opcheck("squash_bwd", (torch.randn(3, 5), torch.randn(3, 5)), backend)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"dim: got 2 for s of shape \[3, 4\]"):
        ops.squash(torch.ones(3, 4), 2)
    with pytest.raises(TypeError, match=r"s: got torch\.int64"):
        ops.squash(torch.ones(3, 4, dtype=torch.int64))
