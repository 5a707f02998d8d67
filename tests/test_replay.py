"""Replayed inference forms against the same forms run as they are: equal bits, and every change seen."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastcnn
from fastcnn import backends, explain, models, native
from fastcnn.cpu.recording import Recording
from fastcnn.nn import ConvBNAct

pytestmark = pytest.mark.skipif(native.module() is None, reason="native module not built")

UNREPLAYED = 3  # calls with a shape that run the model: as it is, recorded, and to compare

MODELS = [
    ("lenet5", (3, 1, 32, 32)),
    ("capsnet", (2, 1, 28, 28)),
    ("mobilenet_v2", (1, 3, 64, 64)),
    ("resnet18", (2, 3, 64, 64)),
    ("densenet121", (2, 3, 64, 64)),
    ("googlenet", (2, 3, 64, 64)),
    ("inception_v3", (1, 3, 96, 96)),
]


class Counted(nn.Module):
    """Counts how often its forward runs, in a list: a new number would be a changed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape)
        return x

    @property
    def calls(self) -> int:
        return len(self.seen)


class Function(nn.Module):
    """A module of this file, which nobody knows."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def small(*more: nn.Module) -> nn.Sequential:
    """Two convolutions, a counter, and what is given."""
    torch.manual_seed(0)
    counted = Counted()
    return nn.Sequential(ConvBNAct(3, 20), counted, ConvBNAct(20, 12, 1), *more).eval()


def replayed(*more: nn.Module, dtype: torch.dtype | None = None) -> tuple[nn.Module, Counted, Callable[[], Tensor]]:
    """An optimized `small` after four calls, the last a replay, its counter, and inputs for it."""
    optimized = fastcnn.optimize(small(*more), dtype, replay=True)
    counter = next(m for m in optimized.modules() if isinstance(m, Counted))

    def images() -> Tensor:
        return torch.randn(2, 3, 9, 9)

    for _ in range(4):
        optimized(images())
    assert counter.calls == UNREPLAYED
    return optimized, counter, images


def as_it_is(optimized: nn.Module, x: Tensor) -> Tensor:
    """The output without a list of kernels."""
    with torch.no_grad():
        return optimized.body(x.to(optimized.dtype)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "shape"), MODELS)
def test_models_replay_the_same_bits(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    optimized = fastcnn.optimize(models.create_model(name).eval(), dtype)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recording, "run", lambda self, run=Recording.run: (calls.append(self), run(self)))
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.rand(shape).contiguous(memory_format=layout)
            for _ in range(UNREPLAYED + 1):
                y = optimized(x)
            expected = as_it_is(optimized, x)
            assert all(map(torch.equal, torch.utils._pytree.tree_leaves(y), torch.utils._pytree.tree_leaves(expected)))
    assert len(calls) >= 4  # 6 of one channel, whose two layouts are one


def test_outputs_have_memory_of_their_own() -> None:
    optimized, _, images = replayed()
    x = images()
    first = optimized(x)
    kept = first.clone()
    optimized(images())
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(optimized(x), kept)


def test_torch_layers_between_kernels_replay() -> None:
    layers = nn.AvgPool2d(2), nn.ReLU(inplace=True), nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(192, 5)
    optimized, counter, images = replayed(*layers)
    x = images()
    assert torch.equal(optimized(x), as_it_is(optimized, x))
    assert counter.calls == UNREPLAYED + 1


def test_structures_of_outputs() -> None:
    optimized, _, images = replayed(Function(lambda x: {"x": x, "more": (x.mean(), x.argmax(1), 3)}))
    x = images()
    y = optimized(x)
    expected = optimized.body(x)
    assert torch.equal(y["x"], expected["x"])
    assert torch.equal(y["more"][1], expected["more"][1])
    assert y["more"][2] == 3


def test_unknown_modules_are_not_replayed_unasked() -> None:
    optimized = fastcnn.optimize(small())
    x = torch.randn(2, 3, 9, 9)
    for _ in range(5):
        optimized(x)
    assert next(m for m in optimized.modules() if isinstance(m, Counted)).calls == 5
    assert fastcnn.optimize(models.create_model("lenet5"), replay=False)._replays is None


def _load(optimized: nn.Module) -> None:
    optimized.load_state_dict({name: 2 * value for name, value in optimized.state_dict().items()})


def _replace_layer(optimized: nn.Module) -> None:
    optimized.body[3] = nn.AvgPool2d(3, 1, 1)


def _write_in_place(optimized: nn.Module) -> None:
    optimized.body[3].weight.mul_(2)


def _write_through_data(optimized: nn.Module) -> None:
    optimized.body[3].weight.data.mul_(2)


def _new_parameter(optimized: nn.Module) -> None:
    optimized.body[3].weight = nn.Parameter(torch.rand(12), requires_grad=False)


def _new_attribute(optimized: nn.Module) -> None:
    optimized.body[3].eps = 1.0


def _converted(optimized: nn.Module) -> None:
    optimized.double().float()


def _patched_forward(optimized: nn.Module) -> None:
    optimized.body[3].forward = lambda x: x + 1


@pytest.mark.parametrize(
    "change",
    [
        _load, _replace_layer, _write_in_place, _write_through_data, _new_parameter, _new_attribute, _converted,
        _patched_forward,
    ],
)  # fmt: skip
def test_changes_are_seen(change: Callable[[nn.Module], None]) -> None:
    optimized, _, images = replayed(nn.BatchNorm2d(12))
    x = images()
    before = optimized(x)
    change(optimized)
    after = optimized(x)
    assert torch.equal(after, as_it_is(optimized, x))
    assert change is _converted or not torch.equal(after, before)
    for _ in range(3):
        assert torch.equal(optimized(x), after)


@pytest.mark.parametrize("of", ["a module", "all modules"])
def test_hooks_fire(of: str) -> None:
    optimized, counter, images = replayed()
    seen = []
    register = counter.register_forward_hook if of == "a module" else nn.modules.module.register_module_forward_hook
    handle = register(lambda *args: seen.append(args))
    optimized(images())
    assert seen
    assert counter.calls == UNREPLAYED + 1
    handle.remove()
    optimized(images())
    assert counter.calls == UNREPLAYED + 1


def test_weights_packed_for_another_instruction_set_are_packed_anew() -> None:
    module = native.module()
    optimized, _counter, images = replayed()
    x, before = images(), module.isa_active()
    try:
        for isa in module.isa_available():
            module.set_isa(isa)
            for _ in range(UNREPLAYED + 1):
                assert torch.equal(optimized(x), as_it_is(optimized, x))
    finally:
        module.set_isa(before)


def test_another_number_of_threads_is_another_list() -> None:
    optimized, counter, images = replayed()
    x, threads = images(), torch.get_num_threads()
    expected = optimized(x)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(optimized(x), expected)
        assert counter.calls == UNREPLAYED + 1
    finally:
        torch.set_num_threads(threads)


def test_a_forced_backend_runs() -> None:
    optimized, counter, images = replayed()
    with backends.force("reference"):
        for _ in range(4):
            y = optimized(images())
    assert counter.calls == 2 * UNREPLAYED  # then a list of the reference's: its results are torch's own, but small
    assert y.shape == (2, 12, 9, 9)


def test_watchers_see_what_runs() -> None:
    optimized, counter, images = replayed()
    x = images()
    assert {row.op for row in explain(optimized, x).rows} >= {"conv2d_fwd", "pointwise_fwd"}
    with FlopCounterMode(display=False):
        optimized(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        optimized(x)
    assert counter.calls == UNREPLAYED + 3
    with torch.device("cpu"):
        optimized(x)
    assert counter.calls == UNREPLAYED + 3


def test_transforms_and_compilation_run_the_layers() -> None:
    optimized, _counter, images = replayed()
    x = images()
    expected = optimized(x)
    assert torch.equal(torch.compile(optimized, backend="eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.jit.trace(optimized, x, check_trace=False)(x), expected)
    with torch.inference_mode():
        assert torch.equal(optimized(x), expected)
        assert torch.equal(optimized(images().copy_(x)), expected)
    assert not optimized(x).is_inference()


def test_a_list_recorded_in_inference_mode_runs_outside() -> None:
    optimized = fastcnn.optimize(small(), replay=True)
    x = torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        expected = [optimized(x) for _ in range(4)][-1]
    assert torch.equal(optimized(x), expected)


def test_models_made_in_inference_mode_are_not_replayed() -> None:
    with torch.inference_mode():
        optimized = fastcnn.optimize(small(), replay=True)
        x = torch.randn(2, 3, 9, 9)
        for _ in range(5):
            optimized(x)
    assert next(m for m in optimized.modules() if isinstance(m, Counted)).calls == 5


def test_copies_record_lists_of_their_own() -> None:
    optimized, counter, images = replayed()
    x = images()
    expected = optimized(x)
    for twin in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert twin._replays is not optimized._replays
        assert twin._replays.held() == 0
        for _ in range(4):
            assert torch.equal(twin(x), expected)
    assert counter.calls == UNREPLAYED


def test_threads_share_a_model() -> None:
    optimized, _, images = replayed()
    inputs = [images() for _ in range(4)]
    expected = [as_it_is(optimized, x) for x in inputs]
    wrong = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(50) if not torch.equal(optimized(inputs[i]), expected[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_processes_forked_from_one_have_memory_of_their_own() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # libgomp's threads do not outlive a fork
    try:
        optimized, _, images = replayed()
        inputs = [images() for _ in range(2)]
        expected = [as_it_is(optimized, x) for x in inputs]
        children = []
        for x, y in zip(inputs, expected, strict=True):
            child = os.fork()
            if not child:
                os._exit(any(not torch.equal(optimized(x), y) for _ in range(200)))
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    finally:
        torch.set_num_threads(threads)


def test_weights_written_to_in_place_are_packed_again() -> None:
    optimized = fastcnn.optimize(small(), replay=True)
    x = torch.randn(2, 3, 9, 9)
    for _ in range(5):
        y = optimized(x)
        for buffer in optimized.buffers():
            buffer.mul_(2)
        assert not torch.equal(optimized(x), y)
        for buffer in optimized.buffers():
            buffer.div_(2)
        assert torch.equal(optimized(x), y)


def test_weights_loaded_after_the_first_call_do_not_end_replay() -> None:
    optimized = fastcnn.optimize(small(), replay=True)
    x = torch.randn(2, 3, 9, 9)
    optimized(x)
    optimized.load_state_dict(optimized.state_dict())
    for _ in range(5):
        optimized(x)
    assert [type(kept).__name__ for kept in optimized._replays._lists.values()] == ["_KernelList"]
