"""Capsule routing: values and gradients on every backend, against the procedure as the paper writes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcnn import backends, ops
from tests.ops import cases
from tests.tolerances import assert_close

# batch, in_caps, in_dim, out_caps, out_dim: around vector widths; the paper's last
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 5, 3, 4, 7),
    (16, 9, 8, 10, 16),
    (17, 33, 4, 3, 8),
    (33, 7, 9, 17, 5),
    (5, 130, 8, 2, 33),
    (3, 1152, 8, 10, 16),
]


def procedure(u, weight, bias=None, iterations=3, leaky=False, detach=False):
    """Procedure 1 of the paper, with the logits it keeps."""
    votes = torch.einsum("bid,iode->bioe", u, weight)
    inner = votes.detach() if detach else votes
    logits = torch.zeros(votes.shape[:3], dtype=u.dtype)
    for i in range(iterations):
        padded = torch.cat((logits, torch.zeros_like(logits[..., :1])), -1) if leaky else logits
        c = padded.softmax(-1)[..., : votes.shape[2]]
        last = i == iterations - 1
        s = (c[..., None] * (votes if last or not detach else inner)).sum(1)
        s = s if bias is None else s + bias
        norm = s.norm(dim=-1, keepdim=True)
        v = norm / (1 + norm.square()) * s
        if not last:
            logits = logits + (inner * (v.detach() if detach else v)[:, None]).sum(-1)
    return v


def arguments(shape, dtype=torch.float32, scale=1.0):
    batch, in_caps, in_dim, out_caps, out_dim = shape
    u = torch.randn(batch, in_caps, in_dim)
    weight = torch.randn(in_caps, out_caps, in_dim, out_dim) * scale / (in_dim * in_caps**0.5) ** 0.5
    return u.to(dtype), weight.to(dtype), torch.randn(out_caps, out_dim) / 4


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_primitives(shape, iterations, leaky, dtype, backend, poison):
    u, weight, bias = arguments(shape, dtype)
    cases.check("capsule_routing_fwd", (u, weight, bias, iterations, leaky), backend)
    s = backends.REFERENCES["capsule_routing_fwd"](u.double(), weight.double(), bias.double(), iterations, leaky)[1]
    grad = torch.randn(u.shape[0], *weight.shape[1::2]).to(dtype)
    for detach in (False, True):
        cases.check("capsule_routing_bwd", (grad, u, weight, s.float(), leaky, detach, True, True), backend)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(needs, backend):
    u, weight, _ = arguments(SHAPES[3])
    s = backends.REFERENCES["capsule_routing_fwd"](u, weight, None, 3, False)[1]
    cases.check("capsule_routing_bwd", (torch.randn(17, 3, 8), u, weight, s, False, False, *needs), backend)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_papers_procedure(with_bias, leaky, detach, preferred):
    u, weight, bias = arguments((6, 40, 8, 10, 16), scale=3.0)
    tensors = [u, weight, bias] if with_bias else [u, weight]

    def ours(u, weight, bias=None):
        return ops.capsule_votes_routing(u, weight, 3, bias, detach, leaky)

    def paper(u, weight, bias=None):
        return procedure(u, weight, bias, 3, leaky, detach)

    cases.compare_gradients(ours, paper, tensors, torch.float32)


@pytest.mark.parametrize("detach", [False, True])
def test_gradcheck(detach):
    u, weight, bias = (t.double().requires_grad_() for t in arguments((2, 4, 3, 3, 2), scale=2.0))
    if not detach:
        assert torch.autograd.gradcheck(lambda *t: ops.capsule_votes_routing(*t[:2], 3, t[2]), (u, weight, bias))
    v = ops.capsule_votes_routing(u, weight, 3, bias, detach)
    grads = torch.autograd.grad(v.sum(), (u, weight, bias))
    expected = torch.autograd.grad(procedure(u, weight, bias, 3, False, detach).sum(), (u, weight, bias))
    for a, e in zip(grads, expected, strict=True):
        assert_close(a, e, torch.float64)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 12), st.integers(1, 20), st.integers(1, 20)),
    iterations=st.integers(1, 4),
    leaky=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(shape, iterations, leaky):
    torch.manual_seed(0)
    u, weight, bias = arguments(shape)
    tensors = [u, weight, bias]
    cases.compare_gradients(
        lambda u, w, b: ops.capsule_votes_routing(u, w, iterations, b, leaky=leaky),
        lambda u, w, b: procedure(u, w, b, iterations, leaky),
        tensors,
        torch.float32,
    )


def test_bits_do_not_depend_on_threads():
    u, weight, bias = arguments((37, 200, 8, 10, 16))
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        v, s = torch.ops.fastcnn.capsule_routing_fwd(u, weight, bias, 3, False)
        results.append([v, s, *torch.ops.fastcnn.capsule_routing_bwd(v, u, weight, s, False, False, True, True)])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e15])
def test_extreme_inputs_stay_finite(value, preferred):
    u = torch.full((3, 6, 4), value, requires_grad=True)
    weight = torch.ones(6, 5, 4, 3, requires_grad=True)
    v = ops.capsule_votes_routing(u, weight, 3)
    v.sum().backward()
    for t in (v, u.grad, weight.grad):
        assert t.isfinite().all()


def test_empty_batch_and_half_precision():
    _, weight, bias = arguments((2, 5, 3, 4, 7))
    assert ops.capsule_votes_routing(torch.empty(0, 5, 3), weight, 3, bias).shape == (0, 4, 7)
    u = torch.randn(2, 5, 3).bfloat16().requires_grad_()
    weight.requires_grad_()
    v = ops.capsule_votes_routing(u, weight, 3, bias)
    v.sum().backward()
    assert (v.dtype, u.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.capsule_votes_routing(torch.randn(2, 5, 3), weight, 3, bias).dtype == torch.bfloat16


def test_opcheck(backend):
    u, weight, bias = arguments((3, 5, 4, 3, 2))
    cases.check_opcheck("capsule_routing_fwd", (u, weight, bias, 2, True), backend)
    _, s = torch.ops.fastcnn.capsule_routing_fwd(u, weight, bias, 2, True)
    args = (torch.randn(3, 3, 2), u, weight, s, True, False, True, True)
    cases.check_opcheck("capsule_routing_bwd", args, backend)


def test_compiles_without_a_graph_break():
    u, weight, bias = arguments((3, 5, 4, 3, 2))
    compiled = torch.compile(lambda *t: ops.capsule_votes_routing(*t[:2], 3, t[2]), backend="aot_eager", fullgraph=True)
    tensors = [t.requires_grad_() for t in (u, weight, bias)]
    v = compiled(*tensors)
    grads = torch.autograd.grad(v.sum(), tensors)
    expected = ops.capsule_votes_routing(u, weight, 3, bias)
    assert torch.equal(v, expected)
    for a, e in zip(grads, torch.autograd.grad(expected.sum(), tensors), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.ones(2, 5)}, ValueError, r"u: got shape \[2, 5\], expected \[batch, in_caps, in_dim\]"),
        ({"W": torch.ones(5, 4, 2, 7)}, ValueError, r"W: got shape .* expected \[5, out_caps, 3, out_dim\]"),
        ({"W": torch.ones(5, 4, 3, 7).double()}, TypeError, "W: got torch.float64"),
        ({"bias": torch.ones(4)}, ValueError, r"bias: got shape \[4\], expected \[4, 7\]"),
        ({"iterations": 0}, ValueError, "iterations: got 0"),
        ({"u": torch.ones(2, 5, 3).long()}, TypeError, "u: got torch.int64"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"u": torch.ones(2, 5, 3), "W": torch.ones(5, 4, 3, 7)}
    with pytest.raises(error, match=message):
        ops.capsule_votes_routing(**{**arguments, **change})
