"""The CUDA capsule routing on a GPU: a model's layer, repeatability, CUDA graphs. Small cases: test_gpu.py."""

from __future__ import annotations

import pytest
import torch

from fastcnn import backends, cuda, ops
from tests.cuda.capsule_cases import BF16, F16, F32, Case, arguments, check, reference
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.unavailable() is not None, reason=f"needs the CUDA backend: {cuda.unavailable()}"),
]
CAPSNET = (100, 1152, 8, 10, 16)
PRIMITIVES = ("capsule_routing_fwd", "capsule_routing_bwd")


@pytest.mark.parametrize("primitive", PRIMITIVES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_models_layer_equals_reference(dtype, primitive):
    case = Case(CAPSNET, scale=3.0, dtype=dtype)
    args = arguments(primitive, case, "cuda")
    check(primitive, case, getattr(cuda, primitive)(*args), reference(primitive, args))


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_same_inputs_give_the_same_bits(primitive):
    args = arguments(primitive, Case(CAPSNET, dtype=BF16), "cuda")
    first, second = (getattr(cuda, primitive)(*args) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_call_runs_here_and_its_gradients_are_right():
    tensors = arguments("capsule_routing_fwd", Case((37, 200, 8, 10, 16), scale=3.0))[:3]
    observed = []

    def observer(name, args, backend, run):
        observed.append((name, backend))
        return run(*args)

    def gradients(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        u, weight, bias = own = [t.to(device, dtype).requires_grad_() for t in tensors]
        v = ops.capsule_votes_routing(u, weight, 3, bias)
        return [v, *torch.autograd.grad(v.square().sum(), own)]

    with backends.observe(observer):
        on_gpu = gradients("cuda", F32)
    assert observed == [(primitive, "cuda") for primitive in PRIMITIVES]
    for actual, expected in zip(on_gpu, gradients("cpu", torch.float64), strict=True):
        assert_close(actual.cpu(), expected, F32)


def test_a_cuda_graph_replays_a_training_step():
    u, weight, bias = (t.requires_grad_() for t in arguments("capsule_routing_fwd", Case(CAPSNET), "cuda")[:3])

    def step() -> list[torch.Tensor]:
        v = ops.capsule_votes_routing(u, weight, 3, bias)
        return [v, *torch.autograd.grad(v.square().sum(), (u, weight, bias))]

    expected = step()  # what the first call loads cannot be loaded during a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, e in zip(captured, expected, strict=True):
        assert torch.equal(a, e)


def test_a_refusal_names_what_came():
    args = arguments("capsule_routing_fwd", Case((2, 5, 3, 4, 7)), "cuda")
    assert cuda.refuses("capsule_routing_fwd", args) is None
    assert "float64" in cuda.refuses("capsule_routing_fwd", (args[0].double(), *args[1:]))
    wide = arguments("capsule_routing_fwd", Case((2, 3, 4, 129, 16)), "cuda")
    assert "more than 2048 outputs" in cuda.refuses("capsule_routing_fwd", wide)
    deep = arguments("capsule_routing_bwd", Case((2, 3, 17, 4, 4)), "cuda")
    assert "an in_dim of at most 16" in cuda.refuses("capsule_routing_bwd", deep)
