"""Runs an inference form again as the list of kernels that it ran before, as a CUDA graph does on a GPU."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_map

from fastcnn import backends, cpu, native
from fastcnn.cpu import memory
from fastcnn.cpu.recording import Recording

MOST_SHAPES = 8  # of inputs, whose lists are kept
_TRUSTED = ("fastcnn", "torch")  # packages whose modules' forward does the same for inputs of the same shape


def is_repeatable(body: nn.Module) -> bool:
    """Whether all modules are of those whose forward does the same for inputs of the same shape."""
    return all(type(module).__module__.partition(".")[0] in _TRUSTED for module in body.modules())


def _arena() -> memory.BlockCache:
    # An outgrown block serves what comes later: a network's last outputs have a sixteenth of its first ones' bytes.
    return memory.BlockCache(limit=None, smallest=4096, slack=15.0)


def _is_seen_by_others(x: Tensor) -> bool:
    """Whether something watches or transforms what torch runs, and would not see a list of kernels."""
    return (
        type(x) is not Tensor
        or backends.is_observed()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
    )


def _own_copy(value: object) -> object:
    """An output in memory of its own, in float32 as `Optimized` returns it."""
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.float32, copy=True) if value.is_floating_point() else value.clone()


class _State:
    """What a body's modules hold, to see whether anything was replaced or written to since."""

    def __init__(self, body: nn.Module) -> None:
        self._body = body
        own = [module.__dict__ for module in body.modules()]
        self._hooks = [d[kind] for d in own for kind in ("_forward_hooks", "_forward_pre_hooks")]
        tensors = [d[kind] for d in own for kind in ("_parameters", "_buffers")]
        self._tensors = [t for d in tensors for t in d.values() if t is not None]
        dicts = [*own, *(d["_modules"] for d in own), *tensors]
        # Held, so that memory that kernels read lives as long as their list.
        self._held = native.module().Held(dicts)
        # Tensors made in inference mode count no versions: that one is written to would not be seen.
        self.is_visible = not any(t.is_inference() for t in self._tensors)
        self._versions = self._now() if self.is_visible else []

    def _now(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t._version) for t in self._tensors]

    def has_hooks(self) -> bool:
        """Whether a module would call something before or after its forward."""
        return any(self._hooks)

    def is_of(self, body: nn.Module) -> bool:
        """Whether that is the body, and its modules hold what they held."""
        same = body is self._body and self._held.unchanged()
        return same and (not self.is_visible or self._now() == self._versions)


class _List:
    """The kernels of one call of a body, with the memory that they read and write."""

    def __init__(self, body: nn.Module, x: Tensor, dtype: torch.dtype, arena: memory.BlockCache) -> None:
        """Runs the body on x, which afterwards `output` returns."""
        self._recording = Recording(arena)
        with torch.inference_mode(False), torch.no_grad():  # or the memory could only be written to in that mode
            self._x = torch.empty_like(x, dtype=dtype if x.is_floating_point() else x.dtype).copy_(x)
            with self._recording.notes():
                self._y = body(self._x)
        self.refusal = self._recording.refusal

    def run(self, x: Tensor) -> object:
        self._x.copy_(x)
        self._recording.run()
        return self.output()

    def output(self) -> object:
        return _own_copy(self._y) if isinstance(self._y, Tensor) else tree_map(_own_copy, self._y)


class Replays:
    """The lists of kernels of one inference form, one for each shape of its input.

    A shape's first call runs as it is, the second is recorded, later ones are replayed: the same kernels on the same
    memory, but nothing between them. Whatever a list cannot know is asked before each call: whether weights, layers,
    hooks, threads or the instruction set have changed, and whether something watches. Then the model runs as it is.

    Args:
        dtype: that the body computes in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._lock = threading.Lock()
        self._start_anew()
        memory.HOLDERS.add(self)

    def __reduce__(self) -> tuple:
        return Replays, (self._dtype,)

    def _start_anew(self) -> None:
        self._lists: OrderedDict[tuple, _List | str | None] = OrderedDict()  # a list, why none, or None: seen once
        self._state: _State | None = None
        self._arena = _arena()

    def forget(self) -> None:
        """Gives all lists and their memory up."""
        with self._lock:
            self._start_anew()

    def held(self) -> int:
        """Bytes of memory that the lists keep."""
        return self._arena.held()

    def run(self, body: nn.Module, x: Tensor) -> object | None:
        """The body's output for x in float32, or None where it has to run as it is."""
        if x.device.type != "cpu" or x.numel() == 0 or not memory.CACHE.limit or cpu.unavailable():
            return None
        if x.is_floating_point() and x.dtype not in (torch.float32, self._dtype):
            return None
        if _is_seen_by_others(x) or not self._lock.acquire(blocking=False):
            return None
        try:
            return self._replayed(body, x)
        finally:
            self._lock.release()

    def _replayed(self, body: nn.Module, x: Tensor) -> object | None:
        if self._state is not None:
            if self._state.has_hooks():
                return None
            if not self._state.is_of(body):
                self._start_anew()
        key = (
            x.shape, x.stride(), x.dtype,
            native.module().isa_active(), torch.get_num_threads(), backends.forced(),
        )  # fmt: skip
        if key not in self._lists:
            self._lists[key] = None
            if len(self._lists) > MOST_SHAPES:
                self._lists.popitem(last=False)
            return None
        self._lists.move_to_end(key)
        found = self._lists[key]
        if found is None:
            return self._record(body, x, key)
        return found.run(x) if isinstance(found, _List) else None

    def _record(self, body: nn.Module, x: Tensor, key: tuple) -> object | None:
        self._state = self._state or _State(body)
        if self._state.has_hooks() or not self._state.is_visible:
            return None
        memory.CACHE.trim()  # what the call before held: the arena takes its place
        made = _List(body, x, self._dtype, self._arena)
        output = made.output()
        if not self._state.is_of(body):
            self._start_anew()
            self._lists[key] = "the model changes when it runs"
        elif self._arena.held() > memory.CACHE.limit:
            size = self._arena.held()
            self._start_anew()
            self._lists[key] = f"{size} bytes of memory are more than FASTCNN_CACHE_MB"
        else:
            self._lists[key] = made.refusal or made
        return output
