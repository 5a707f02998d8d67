"""The CUDA dropout on a GPU: the CPU's masks, CUDA graphs, sizes beyond 32 bits. Its values: test_gpu.py's small cases."""

from __future__ import annotations

import pytest
import torch

from fastcnn import backends, cuda, ops
from fastcnn.ops.dropout import ELEMENT, threshold
from fastcnn.ops.philox import draws
from tests.cuda.dropout_cases import BF16, F16, F32, SHAPES, UNITS, Case, arguments, kept_like, placed, seed_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.unavailable() is not None, reason=f"needs the CUDA backend: {cuda.unavailable()}"),
]


@pytest.mark.small
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1], ids=str)
def test_masks_are_the_cpus_bit_for_bit(shape, unit, dtype):
    for nhwc in (True, False):
        x = placed(torch.ones(torch.Size(shape).numel()), Case(shape, nhwc=nhwc, dtype=dtype))
        for p in (0.0, 0.4, 1.0):
            out = cuda.dropout_fwd(x.cuda(), None, 0, None, p, 3.0, unit, seed_of(device="cuda"))
            assert torch.equal(out.cpu(), kept_like(x, None, p, unit, seed_of()).to(dtype) * 3)


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_a_call_is_the_same_on_either_device(unit):
    function = {"element": ops.dropout, "channel": ops.dropout2d, "sample": ops.drop_path}[list(UNITS)[unit]]
    x = torch.randn(16, 96, 28, 28).contiguous(memory_format=torch.channels_last)
    observed = []

    def observer(name, args, backend, run):
        observed.append((name, backend))
        return run(*args)

    with backends.observe(observer):
        on_gpu = function(x.cuda(), 0.3, seed=(11, 12))
    assert observed == [("dropout_fwd", "cuda")]
    assert torch.equal(on_gpu.cpu(), function(x, 0.3, seed=(11, 12)))


def test_gradients_of_a_fused_call():
    x = torch.randn(16, 96, 28, 28).contiguous(memory_format=torch.channels_last)
    tensors = [x, torch.randn(96), torch.randn_like(x)]

    def gradients(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        own = [t.to(device, dtype).requires_grad_() for t in tensors]
        y = ops.dropout(own[0], 0.3, bias=own[1], act="silu", residual=own[2], seed=5)
        return [y, *torch.autograd.grad(y.square().sum(), own)]

    for actual, expected in zip(gradients("cuda", F32), gradients("cpu", torch.float64), strict=True):
        assert (actual.cpu() - expected).norm() <= 1e-5 * expected.norm()


def test_replays_of_a_cuda_graph_draw_anew_and_torchs_seed_repeats_them():
    x = torch.ones(1 << 16, device="cuda")
    ops.dropout(x)  # what the first call loads cannot be loaded during a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.dropout(x, 0.5)

    def replays() -> list[torch.Tensor]:
        torch.cuda.manual_seed(3)
        results = []
        for _ in range(3):
            graph.replay()
            results.append(y.clone())
        return results

    first, again = replays(), replays()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for i, a in enumerate(first):
        assert set(a.unique().tolist()) == {0.0, 2.0}
        for b in first[:i]:
            assert 0.45 < (a == b).float().mean() < 0.55


def test_a_captured_training_step_drops_the_same_in_backward():
    x = torch.ones(1 << 16, device="cuda", requires_grad=True)
    torch.autograd.grad(ops.dropout(x).sum(), x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.dropout(x, 0.5)
        (dx,) = torch.autograd.grad(y.sum(), x)
    for _ in range(2):
        graph.replay()
        assert torch.equal(dx, y)


def test_same_inputs_give_the_same_bits():
    args = arguments("dropout_bwd", Case((16, 96, 28, 28), bias=True, act=3, dtype=BF16), "cuda")
    (dx, dbias), (dx_again, dbias_again) = (cuda.dropout_bwd(*args) for _ in range(2))
    assert torch.equal(dx, dx_again)
    assert torch.equal(dbias, dbias_again)


def test_draws_beyond_32_bits_of_counter():
    size = (1 << 34) + 27
    if torch.cuda.mem_get_info()[0] < 36 * 2**30:
        pytest.skip("needs 36 GiB of GPU memory")
    x, seed = torch.ones(size, dtype=BF16, device="cuda"), seed_of(device="cuda")
    cuda.dropout_inplace(x, 0.5, 2.0, ELEMENT, seed)
    for first in (0, (1 << 31) - 64, (1 << 32) - 64, (1 << 34) - 64):
        index = torch.arange(first, min(first + 128, size), device="cuda")
        expected = (draws(index, seed) >= threshold(0.5)).to(BF16) * 2
        assert torch.equal(x[first : first + 128], expected)


def test_a_refusal_names_what_came():
    x, *rest = arguments("dropout_fwd", Case((9, 130)), "cuda")
    assert "float64" in cuda.refuses("dropout_fwd", (x.double(), *rest))
    assert "one on cpu" in cuda.refuses("dropout_fwd", (x, *rest[:-1], seed_of()))
    assert cuda.refuses("dropout_fwd", (x, *rest)) is None
