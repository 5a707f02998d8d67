"""Capsule routing: values and gradients of its kernels, around the edges of their tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcnn import backends, ops
from fastcnn import triton as backend
from fastcnn.triton import capsule_tiles
from fastcnn.triton.launch import INTERPRETED
from tests.tolerances import assert_close
from tests.triton.compare import DTYPES, check, on

# batch, in_caps, in_dim, out_caps, out_dim
SHAPES = (
    (1, 1, 1, 1, 1),
    (2, 5, 3, 4, 7),
    (17, 9, 8, 3, 16),
    (3, 3, 17, 5, 20),  # a capsule wider than half a tile, an output capsule wider than 16
    (33, 2, 40, 2, 3),  # one wider than a tile
)
PAPER = (100, 1152, 8, 10, 16)
NEEDS = ((True, False), (False, True), (False, False))


def arguments(shape, dtype=torch.float32, weight_dtype=None, scale=1.0) -> tuple[Tensor, Tensor, Tensor]:
    """u, W and bias; W keeps the size of s."""
    batch, in_caps, in_dim, out_caps, out_dim = shape
    weight = torch.randn(in_caps, out_caps, in_dim, out_dim) * scale / (in_dim * in_caps**0.5) ** 0.5
    u = torch.randn(batch, in_caps, in_dim).to(dtype)
    return u, weight.to(weight_dtype or dtype), torch.randn(out_caps, out_dim) / 4


def backward_arguments(u, weight, bias, iterations, leaky, *how) -> tuple:
    """Arguments of capsule_routing_bwd, s being the reference's."""
    exact = None if bias is None else bias.double()
    s = backends.REFERENCES["capsule_routing_fwd"](u.double(), weight.double(), exact, iterations, leaky)[1]
    return torch.randn(s.shape[1:]).to(u.dtype), u, weight, s.float(), leaky, *how


def check_both(tensors, iterations, leaky, detach, device) -> None:
    """Forward and backward against the float64 reference."""
    check("capsule_routing_fwd", (*tensors, iterations, leaky), device)
    check("capsule_routing_bwd", backward_arguments(*tensors, iterations, leaky, detach, True, True), device)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_every_form(shape, iterations, leaky, detach, device):
    check_both(arguments(shape, scale=3.0), iterations, leaky, detach, device)


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_edges_of_tiles(shape, device):
    check_both(arguments(shape), 2, False, False, device)


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(dtype, weight_dtype, device):
    check_both(arguments((5, 7, 4, 3, 8), dtype, weight_dtype), 3, True, False, device)


def test_no_bias(device):
    check_both((*arguments(SHAPES[1])[:2], None), 3, False, False, device)


def test_chunks_of_several_blocks(device, monkeypatch):
    monkeypatch.setattr(capsule_tiles, "PROGRAMS", 5)
    check_both(arguments((2, 7, 16, 2, 3)), 2, False, False, device)


def test_more_chunks_than_are_folded_at_a_time(device):
    check("capsule_routing_fwd", (*arguments((2, 70, 16, 1, 4)), 1, True), device)


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("detach", [False, True])
def test_only_what_is_needed(detach, needs, device):
    check("capsule_routing_bwd", backward_arguments(*arguments(SHAPES[1]), 3, False, detach, *needs), device)


def test_no_images(device):
    u, weight, bias = arguments((0, 5, 3, 4, 7))
    check("capsule_routing_fwd", (u, weight, bias, 3, False), device)
    grad, s = torch.empty(0, 4, 7), torch.empty(3, 0, 4, 7)
    check("capsule_routing_bwd", (grad, u, weight, s, False, False, True, True), device)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-3, 1e15, 1e30])
def test_extreme_inputs_stay_finite(value, device):
    u, weight = on(device, (torch.full((3, 6, 4), value), torch.ones(6, 5, 4, 3)))
    v, s = backend.capsule_routing_fwd(u, weight, None, 3, False)
    gradients = backend.capsule_routing_bwd(torch.ones_like(v), u, weight, s, False, False, True, True)
    for t in (v, s, *gradients):
        assert t.isfinite().all()
    assert_close(v.cpu(), backends.REFERENCES["capsule_routing_fwd"](u.cpu(), weight.cpu(), None, 3, False)[0], u.dtype)


def test_sharp_coupling(device):
    # Logits of some hundreds: exponentials overflow without the largest, and the rest of them vanish.
    check("capsule_routing_fwd", (*arguments(SHAPES[1], scale=300.0), 2, False), device)


def test_the_public_function(device):
    tensors = [t.to(device).requires_grad_() for t in arguments(SHAPES[1])]
    with backends.force("triton"):
        v = ops.capsule_votes_routing(*tensors[:2], 3, tensors[2])
        gradients = torch.autograd.grad(v.square().sum(), tensors)
    exact = [t.detach().cpu().double().requires_grad_() for t in tensors]
    expected = ops.capsule_votes_routing(*exact[:2], 3, exact[2])
    assert_close(v.cpu(), expected, torch.float32)
    for a, e in zip(gradients, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert_close(a.cpu(), e, torch.float32)


def test_what_it_refuses():
    u, weight = torch.zeros(1, 2, 64), torch.zeros(2, 3, 64, 65)
    if INTERPRETED:
        assert "they are 64 and 65" in backend.refuses("capsule_routing_fwd", (u, weight, None, 3, False))
        assert backend.refuses("capsule_routing_fwd", (u, weight[..., :64], None, 3, False)) is None
    backward = torch.zeros(1, 3, 64), u.double(), weight, torch.zeros(3, 1, 3, 64), False, False, True, True
    assert "the input is torch.float64" in backend.refuses("capsule_routing_bwd", backward)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_papers_layer(dtype, gpu):
    tensors = arguments(PAPER, dtype)
    check_both(tensors, 3, False, False, gpu)
    u, weight, bias = on(gpu, tensors)
    results = []
    for _ in range(2):
        v, s = backend.capsule_routing_fwd(u, weight, bias, 3, False)
        results.append((v, s, *backend.capsule_routing_bwd(v, u, weight, s, False, False, True, True)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(200, 300, 8, 100, 32), (5, 40, 64, 7, 64), (70, 130, 16, 12, 200)], ids=str)
def test_large_layers(shape, gpu):
    check_both(arguments(shape), 3, True, False, gpu)
