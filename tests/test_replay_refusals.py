"""What is not the same when it runs again is not replayed; what is kept for replays is bounded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn
from fastcnn import native
from fastcnn.cpu import memory
from fastcnn.cpu.recording import MOST_COPIED
from fastcnn.nn import ConvBNAct, Dropout
from fastcnn.replay import MOST_SHAPES
from tests.test_replay import Counted, Function, as_it_is, replayed, small
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(native.module() is None, reason="native module not built")


def refusal(optimized: nn.Module) -> str:
    """Why the one shape that was seen is not replayed."""
    (found,) = optimized._replays._lists.values()
    return found


class Held:
    """An output that nobody knows."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Dropout(0.5), "dropout"),
        (nn.Dropout(0.5), "bernoulli"),
        (Function(lambda x: x * float(x.sum())), "_local_scalar_dense"),
        (Function(lambda x: x[x > 0]), "depends"),
        (Function(lambda x: x + torch.tensor([1.0])), "Python"),
        (Function(lambda x: F.pad(x, (MOST_COPIED // 9, 0))), "bytes"),
        (Function(lambda x: x * x.mean((0, 2, 3)).tolist()[0]), "other values"),
        (Function(lambda x: x.resize_(2, 3, 4)), "which memory"),
        (nn.BatchNorm2d(12), "changes"),
    ],
)
def test_what_is_not_the_same_again_is_not_replayed(layer: nn.Module, why: str) -> None:
    optimized = fastcnn.optimize(small(layer), replay=True)
    optimized.body[3].train()
    counter = next(m for m in optimized.modules() if isinstance(m, Counted))
    for _ in range(10):
        optimized(torch.randn(2, 3, 9, 9))
    assert why in refusal(optimized)
    calls = counter.calls
    optimized(torch.randn(2, 3, 9, 9))
    assert counter.calls == calls + 1
    assert optimized._replays.held() == 0


def test_few_shapes_are_kept() -> None:
    optimized, counter, images = replayed()
    held = optimized._replays.held()
    for size in range(10, 10 + MOST_SHAPES):
        for _ in range(3):
            optimized(torch.randn(1, 3, size, size))
    assert len(optimized._replays._lists) == MOST_SHAPES
    assert optimized._replays.held() <= 16 * held
    calls = counter.calls
    optimized(images())
    assert counter.calls == calls + 1


def test_memory_is_given_back() -> None:
    optimized, _counter, images = replayed()
    assert optimized._replays.held() > 0
    memory.empty_cache()
    assert optimized._replays.held() == 0
    x = images()
    assert torch.equal(optimized(x), as_it_is(optimized, x))


def test_no_memory_is_kept_where_none_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.CACHE, "limit", 0)
    optimized = fastcnn.optimize(small(), replay=True)
    for _ in range(4):
        optimized(torch.randn(2, 3, 9, 9))
    assert optimized._replays.held() == 0
    monkeypatch.setattr(memory.CACHE, "limit", 1000)
    for _ in range(2):
        optimized(torch.randn(2, 3, 9, 9))
    assert optimized._replays.held() == 0
    assert "FASTCNN_CACHE_MB" in refusal(optimized)


def test_wrong_inputs_are_errors_as_before() -> None:
    optimized, _, images = replayed()
    with pytest.raises(ValueError, match="x: got shape"):
        optimized(torch.randn(2, 4, 9, 9))
    with pytest.raises(TypeError, match=r"x: got torch\.float64"):
        optimized(images().double())
    optimized(images())


def test_call_lists_reject_what_they_do_not_hold() -> None:
    calls, other = native.module().CallList(), native.module().CallList()
    calls.start()
    try:
        with pytest.raises(RuntimeError, match="recorded already"):
            other.start()
    finally:
        calls.stop()
    with pytest.raises(ValueError, match="got calls 0 to 1 of 0"):
        calls.run(0, 1)


def test_outputs_that_nobody_knows_are_not_replayed() -> None:
    optimized = fastcnn.optimize(nn.Sequential(ConvBNAct(3, 8), Function(Held)).eval(), replay=True)
    x = torch.randn(2, 3, 9, 9)
    kept = [optimized(x).x for _ in range(5)]
    assert "Held is returned" in refusal(optimized)
    assert len({y.data_ptr() for y in kept}) == 5


def test_shapes_that_change_in_place_stay_what_they_were() -> None:
    def turned(x: Tensor) -> Tensor:
        y = x.sum(1)
        x.transpose_(2, 3)
        return y

    optimized, _, images = replayed(Function(turned), Function(lambda x: x.unsqueeze_(0) * 2))
    x = images()
    assert torch.equal(optimized(x), as_it_is(optimized, x))


@pytest.mark.parametrize("kind", ["script", "fx"])
def test_modules_of_other_kinds_run_as_they_are(kind: str) -> None:
    for replay in (None, True):
        relu = nn.Sequential(nn.ReLU())
        layer = torch.jit.script(relu) if kind == "script" else torch.fx.symbolic_trace(relu)
        optimized = fastcnn.optimize(nn.Sequential(ConvBNAct(3, 8), layer).eval(), replay=replay)
        x = torch.randn(1, 3, 8, 8)
        for _ in range(5):
            assert torch.equal(optimized(x), as_it_is(optimized, x))


def test_a_forward_of_an_instance_is_not_trusted() -> None:
    patched = nn.Sequential(ConvBNAct(3, 8), nn.Identity()).eval()
    patched[1].forward = lambda x: x + 1
    assert fastcnn.optimize(patched)._replays is None


def test_inputs_of_other_layouts_run_as_they_are() -> None:
    optimized = fastcnn.optimize(nn.Sequential(nn.Linear(4, 4)))
    for _ in range(4):
        y = optimized(torch.eye(4).to_sparse_csr())
    assert_close(y, optimized(torch.eye(4)), torch.float32)


def test_none_is_an_output() -> None:
    optimized, counter, images = replayed(Function(lambda x: None))
    calls = counter.calls
    assert optimized(images()) is None
    assert counter.calls == calls
