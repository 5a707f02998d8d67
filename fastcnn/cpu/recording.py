"""A function's kernels noted with their memory, to run again without Python and torch's dispatcher between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastcnn import backends, native
from fastcnn.cpu import memory

# A result of torch's own is made anew and copied to where its readers look: above this the copy costs more than the
# calls that it saves.
MOST_COPIED = 1 << 20
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_COPIES = {"clone", "_to_copy"}
# Their results are other ones, or of another size, when they run again.
_UNREPEATABLE = (torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


class Recording:
    """Notes the kernels that a function runs on this thread; `run` runs them again on the same memory.

    Args:
        arena: where the kernels' outputs lie: of recordings that never run at the same time.

    Attributes:
        refusal: why what was noted cannot run again, or None.
    """

    def __init__(self, arena: memory.BlockCache) -> None:
        self.refusal: str | None = None
        self._calls = native.module().CallList()
        self._arena, self._noted = arena, 0
        self._steps: list[Callable[[], object]] = []
        self._kept: list[Tensor] = []  # results of torch's own ops: memory that the arena does not hold

    @contextlib.contextmanager
    def notes(self) -> Iterator[None]:
        """Within the block what runs is noted."""
        self._calls.start()
        try:
            with memory.allocating_from(self._arena), _TorchOps(self):
                yield
        finally:
            self._calls.stop()
        self._note_calls()
        if not self._calls.repeatable:
            self.refusal = "a dropout draws other numbers each time"

    def run(self) -> None:
        """Runs what was noted, in its order."""
        for step in self._steps:
            step()

    def _note_calls(self) -> None:
        """The kernels since the last step as a step of their own."""
        first, self._noted = self._noted, len(self._calls)
        if self._noted > first:
            self._steps.append(partial(self._calls.run, first, self._noted))

    def note(self, func: torch._ops.OpOverload, args: Sequence, kwargs: dict, results: list) -> None:
        """Notes one of torch's own ops that has run."""
        name = func.overloadpacket.__name__
        self.refusal = self.refusal or _refusal(func, args, kwargs, results, self._arena)
        if self.refusal or torch.Tag.inplace_view in func.tags:
            return
        # As they are now: an op that gives a tensor another shape in place may follow.
        args, kwargs, results = tree_map(_alias, (args, kwargs, results))
        if name in _ALLOCATIONS:
            self._kept += results
            return
        if func._schema.is_mutable:
            step = partial(func, *args, **kwargs)
        elif _are_views(results, args, kwargs):
            return
        else:
            self._kept += results
            copies = name in _COPIES
            step = partial(results[0].copy_, args[0]) if copies else partial(_run_again, func, args, kwargs, results)
        self._note_calls()
        self._steps.append(step)

    def kept_bytes(self) -> int:
        """Bytes of memory that the arena does not hold."""
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self._kept}
        return sum(storages.values())


class _TorchOps(TorchDispatchMode):
    """Hands torch's own ops to a recording, those within fastcnn's primitives too."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastcnn":
            args = (*args, *(kwargs[a.name] for a in func._schema.arguments[len(args) :]))
            with self:
                return backends.choose(func.overloadpacket.__name__, args)(*args)
        with self:  # within a primitive torch's composites come whole: a `to` that may be a view or a copy
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        self._recording.note(func, args, kwargs, tree_leaves(result))
        return result


def _alias(value: object) -> object:
    """A tensor with the same memory, whose shape is its own."""
    return value.detach() if isinstance(value, Tensor) else value


def _are_views(results: Sequence, args: Sequence, kwargs: dict) -> bool:
    """Whether all results are memory of the arguments."""
    owned = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    return all(t.untyped_storage()._cdata in owned for t in results)


def _refusal(
    func: torch._ops.OpOverload, args: Sequence, kwargs: dict, results: Sequence, arena: memory.BlockCache
) -> str | None:
    """Why an op of torch's own is not the same when it runs again, or None."""
    name = func.overloadpacket.__name__
    if any(tag in func.tags for tag in _UNREPEATABLE) or not all(isinstance(r, Tensor) for r in results):
        return f"{name} depends on more than its arguments' shapes"
    if name.startswith("lift"):
        return "a tensor is made of Python's numbers"
    if torch.Tag.inplace_view in func.tags:
        moves = name.startswith("resize") or (name == "set_" and not (len(args) > 1 and arena.owns(args[1])))
        return f"{name} changes which memory a tensor has" if moves else None
    if name in _ALLOCATIONS or name in _COPIES or _are_views(results, args, kwargs):
        return None
    if func._schema.is_mutable:
        return f"{name} makes results beside those that it writes to"
    size = sum(r.numel() * r.element_size() for r in results)
    return f"{name} is torch's and makes {size} bytes" if size > MOST_COPIED else None


def _run_again(func: Callable, args: Sequence, kwargs: dict, places: Sequence[Tensor]) -> None:
    """An op's results where those of its first run are."""
    for place, result in zip(places, tree_leaves(func(*args, **kwargs)), strict=True):
        place.copy_(result)
