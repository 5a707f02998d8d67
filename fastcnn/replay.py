"""Runs an inference form again as the list of kernels that it ran before, as a CUDA graph does on a GPU."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves, tree_map

from fastcnn import backends, cpu, native
from fastcnn.cpu import memory
from fastcnn.cpu.recording import Recording
from fastcnn.ops.layout import versions

MOST_SHAPES = 8  # of inputs, whose lists are kept
_MOST_CHANGES = 3  # that a model may make to itself, before its lists are given up
_TRUSTED = ("fastcnn.", "torch.nn.")  # packages whose modules' forward does the same for inputs of the same shape
_PLAIN = (int, float, bool, str, type(None))


def is_repeatable(body: nn.Module) -> bool:
    """Whether all modules are of those whose forward does the same for inputs of the same shape."""
    return all(type(m).__module__.startswith(_TRUSTED) and "forward" not in m.__dict__ for m in body.modules())


def _arena() -> memory.BlockCache:
    # An outgrown block serves what comes later: a network's last outputs have a sixteenth of its first ones' bytes.
    return memory.BlockCache(limit=None, smallest=4096, slack=15.0)


def _is_ordinary(x: Tensor) -> bool:
    return type(x) is Tensor and x.device.type == "cpu" and x.layout is torch.strided and not x.is_nested


def _is_watched() -> bool:
    """Whether something watches or transforms what torch runs, and would not see a list of kernels."""
    return backends.is_watched() or bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _own_copy(value: object) -> object:
    """An output in memory of its own, in float32 as `Optimized` returns it."""
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.float32, copy=True) if value.is_floating_point() else value.clone()


def _are_equal(a: object, b: object) -> bool:
    """Whether two outputs have the same values, of which NaN is one."""
    ours, theirs = tree_leaves(a), tree_leaves(b)
    if len(ours) != len(theirs):
        return False
    return all(_is_equal(p, q) if isinstance(p, Tensor) else p == q for p, q in zip(ours, theirs, strict=True))


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, 0, 0, equal_nan=True)


class _State:
    """What a body's modules hold, to see whether anything was replaced or written to since."""

    def __init__(self, body: nn.Module) -> None:
        self._body = body
        own = [module.__dict__ for module in body.modules()]
        self._hooks = [d[kind] for d in own for kind in ("_forward_hooks", "_forward_pre_hooks")]
        tensors = [d[kind] for d in own for kind in ("_parameters", "_buffers")]
        self._tensors = [t for d in tensors for t in d.values() if t is not None]
        # Held, so that memory that kernels read lives as long as their list.
        self._snapshot = native.module().DictSnapshot([*own, *(d["_modules"] for d in own), *tensors])
        # Tensors made in inference mode count no versions: that one is written to would not be seen.
        self.is_visible = not any(t.is_inference() for t in self._tensors)
        self._versions = versions(self._tensors)

    def has_hooks(self) -> bool:
        """Whether a module would call something before or after its forward."""
        return any(self._hooks)

    def is_of(self, body: nn.Module) -> bool:
        """Whether that is the body, and its modules hold what they held."""
        return body is self._body and self._snapshot.unchanged() and versions(self._tensors) == self._versions


class _KernelList:
    """The kernels of one call of a body, with the memory that they read and write."""

    def __init__(self, body: nn.Module, x: Tensor, dtype: torch.dtype, arena: memory.BlockCache) -> None:
        """Runs the body on x, which afterwards `output` returns."""
        self._recording = Recording(arena)
        self.is_checked = False
        with torch.inference_mode(False), torch.no_grad():  # or the memory could only be written to in that mode
            self._x = torch.empty_like(x, dtype=dtype if x.is_floating_point() else x.dtype).copy_(x)
            with self._recording.notes():
                self._y = body(self._x.detach())
        self.refusal = self._recording.refusal
        for leaf in tree_leaves(self._y):
            if not (_is_ordinary(leaf) if isinstance(leaf, Tensor) else isinstance(leaf, _PLAIN)):
                self.refusal = f"a {type(leaf).__name__} is returned"

    def run(self, x: Tensor) -> object:
        """The output for x."""
        self._x.copy_(x)
        self._recording.run()
        return self.output()

    def output(self) -> object:
        """The last output, in memory of its own."""
        return _own_copy(self._y) if isinstance(self._y, Tensor) else tree_map(_own_copy, self._y)

    def kept_bytes(self) -> int:
        """Bytes of memory beside the arena's."""
        return self._x.untyped_storage().nbytes() + self._recording.kept_bytes()


class Replays:
    """The lists of kernels of one inference form, one for each shape of its input.

    A shape's first call runs as it is, the second is recorded, the third runs both ways to compare the results, and later
    ones are replayed: the same kernels on the same memory, but nothing between them. Whatever a list cannot know is asked
    before each call: whether weights, layers, their attributes, hooks, threads or the instruction set have changed, and
    whether something watches. Then the model runs as it is. Not seen is what is written through ``.data`` or into a list
    that a layer keeps. An input that a first layer would write to stays as it is.

    Args:
        dtype: that the body computes in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._changes = 0
        self._reset()
        self.renew_lock()
        memory.HOLDERS.add(self)

    def __reduce__(self) -> tuple:
        return Replays, (self._dtype,)

    def _reset(self) -> None:
        self._lists: OrderedDict[tuple, _KernelList | str | None] = OrderedDict()  # a list, why none, or seen once
        self._state: _State | None = None
        self._arena = _arena()

    def renew_lock(self) -> None:
        """For a process that was forked while another thread held it or the arena's."""
        self._lock = threading.Lock()
        self._arena.renew_lock()

    def forget(self) -> None:
        """Gives all lists and their memory up."""
        with self._lock:
            self._reset()

    def held(self) -> int:
        """Bytes of memory that the lists keep."""
        return self._arena.held() + sum(kept.kept_bytes() for kept in self._recorded())

    def _recorded(self) -> list[_KernelList]:
        return [kept for kept in self._lists.values() if isinstance(kept, _KernelList)]

    def run(self, body: nn.Module, x: Tensor, as_it_is: Callable[[Tensor], object]) -> object:
        """The body's output for x in float32, which ``as_it_is`` makes where no list does."""
        if not self._takes(x) or _is_watched() or not self._lock.acquire(blocking=False):
            return as_it_is(x)
        try:
            found = self._replayed(body, x, as_it_is)
        finally:
            self._lock.release()
        return as_it_is(x) if found is None else found[0]

    def _takes(self, x: Tensor) -> bool:
        if not _is_ordinary(x) or x.numel() == 0 or not memory.CACHE.limit or cpu.unavailable():
            return False
        return not x.is_floating_point() or x.dtype in (torch.float32, self._dtype)

    def _replayed(self, body: nn.Module, x: Tensor, as_it_is: Callable[[Tensor], object]) -> tuple[object] | None:
        if self._state is not None:
            if self._state.has_hooks():
                return None
            if not self._state.is_of(body):
                self._reset()
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
        if isinstance(found, str):
            return None
        if not found.is_checked:
            return self._check(x, key, found, as_it_is)
        return (found.run(x),)

    def _record(self, body: nn.Module, x: Tensor, key: tuple) -> tuple[object] | None:
        """The second call. Where it fails, the model as it is says why."""
        try:
            self._state = self._state or _State(body)
            if self._state.has_hooks() or not self._state.is_visible:
                return None
            memory.CACHE.trim()  # what the call before held: the arena takes its place
            made = _KernelList(body, x, self._dtype, self._arena)
        except Exception as error:  # whatever an unknown module raises
            self._refuse(key, f"recording raised {type(error).__name__}: {error}")
            return None
        if not self._state.is_of(body):
            self._changes += 1
            self._reset()
            self._lists[key] = None if self._changes <= _MOST_CHANGES else "the model changes when it runs"
        elif made.refusal:
            self._refuse(key, made.refusal)
        else:
            self._lists[key] = made
            self._limit(key)
        return (made.output(),)

    def _check(self, x: Tensor, key: tuple, found: _KernelList, as_it_is: Callable[[Tensor], object]) -> tuple[object]:
        """The third call: what no rule foresees shows in its results."""
        replayed, expected = found.run(x), as_it_is(x)
        found.is_checked = _are_equal(replayed, expected)
        if not found.is_checked:
            self._refuse(key, "its second run made other values than the model")
        return (expected,)

    def _refuse(self, key: tuple, why: str) -> None:
        self._lists[key] = why
        if not self._recorded():
            self._arena = _arena()

    def _limit(self, key: tuple) -> None:
        """Gives the other lists up, or the newest where it is alone, if they hold too much."""
        held = self.held()
        if held <= memory.CACHE.limit:
            return
        alone = len(self._recorded()) == 1
        self._reset()
        self._lists[key] = f"{held} bytes of memory are more than FASTCNN_CACHE_MB" if alone else None
