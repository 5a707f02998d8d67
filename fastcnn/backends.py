"""Which backend runs which primitive: one table, one choice, and an account of it.

A backend is a package with a function of a primitive's name for each primitive that it has, and two questions:
``unavailable() -> str | None`` (why it can run nothing here) and ``refuses(name, args) -> str | None`` (why it cannot
run this call). It may also have ``yields(name, args) -> str | None``: why it leaves a call to the backends after it
unless it is forced, a shape for which one of them is measured faster; and ``COMPOSITES``: what is a composition of
primitives elsewhere and one call here, as modules with that composition's functions and ``refuses(x, *args) -> bool``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

# Filled by fastcnn.ops.registry.register: the plain-torch implementation of every primitive.
REFERENCES: dict[str, Callable] = {}

PREFERENCE = {"cpu": ("cpu", "unfused", "reference"), "cuda": ("cuda", "triton", "reference")}
BACKENDS = ("cpu", "unfused", "cuda", "triton", "reference")


class BackendError(RuntimeError):
    """A backend was forced where it cannot run."""


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_forced: list[str] = []
if os.environ.get("FASTCNN_BACKEND"):
    _forced.append(_checked(os.environ["FASTCNN_BACKEND"], "FASTCNN_BACKEND"))


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Within the block every primitive runs on the named backend or raises BackendError.

    Raises:
        ValueError: an unknown backend.
    """
    _forced.append(_checked(name, "backend"))
    try:
        yield
    finally:
        _forced.pop()


def forced() -> str | None:
    """The backend that every primitive runs on, or None."""
    return _forced[-1] if _forced else None


# An observer stands between a call and its implementation: it gets (primitive, args, backend, function) and
# returns function(*args). There is none but within fastcnn.explain and in tests.
Observer = Callable[[str, Sequence, str, Callable], object]
_observers: list[Observer] = []


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Within the block the observer runs every primitive, and sees its arguments, backend and outputs."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def is_observed() -> bool:
    """Whether an observer sees the primitives that run."""
    return bool(_observers)


def is_watched() -> bool:
    """Whether something sees each primitive and operation that runs, and would not see them in a larger call.

    An observer, a mode (a default device but the CPU is one), a transform, a trace or a profiler.
    """
    return (
        is_observed()
        or torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and not _only_names_the_cpu())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
    )


def _only_names_the_cpu() -> bool:
    """Whether all there is on the stack of modes is torch.set_default_device("cpu")."""
    modes = _get_current_function_mode_stack()
    return all(type(mode) is DeviceContext and mode.device.type == "cpu" for mode in modes)


def _observed(function: Callable, primitive: str, backend: str) -> Callable:
    for observer in _observers:
        function = partial(_run_observed, observer, primitive, backend, function)
    return function


def _run_observed(observer: Observer, primitive: str, backend: str, function: Callable, *args) -> object:
    return observer(primitive, args, backend, function)


class _Implementation(NamedTuple):
    function: Callable | None
    reason: str  # why there is none
    refuses: Callable[[str, Sequence], str | None]
    yields: Callable[[str, Sequence], str | None]


def _never(_primitive: str, _args: Sequence) -> None:
    return None


@cache
def _implementation(backend: str, primitive: str) -> _Implementation:
    """The backend's function for a primitive, or None and the reason."""
    if backend == "reference":
        return _Implementation(REFERENCES[primitive], "", _never, _never)
    try:
        module = importlib.import_module(f"fastcnn.{backend}")
    except ImportError as error:
        return _Implementation(None, str(error), _never, _never)
    reason = module.unavailable()
    if reason:
        return _Implementation(None, reason, _never, _never)
    function = getattr(module, primitive, None)
    reason = "" if function else f"the {backend} backend has no {primitive}"
    return _Implementation(function, reason, module.refuses, getattr(module, "yields", _never))


def refusal(backend: str, primitive: str, args: Sequence) -> str | None:
    """Why a backend will not run this call, or None if it will."""
    implementation = _implementation(backend, primitive)
    if not implementation.function:
        return implementation.reason
    reason = implementation.refuses(primitive, args)
    return implementation.yields(primitive, args) if reason is None and not _forced else reason


def _order(args: Sequence) -> Sequence[str]:
    return _forced[-1:] or PREFERENCE.get(args[0].device.type, ("reference",))


def candidates(primitive: str, args: Sequence) -> list[tuple[str, str | None]]:
    """Every backend in order of preference with None if it would run this call, or the reason why not."""
    return [(backend, refusal(backend, primitive, args)) for backend in _order(args)]


def selected(primitive: str, args: Sequence) -> str:
    """The name of the backend that runs this call.

    Raises:
        BackendError: the forced backend cannot run it.
    """
    if args[0].numel() == 0 and not _forced:
        return "reference"
    reason = None
    for backend in _order(args):
        reason = refusal(backend, primitive, args)
        if reason is None:
            return backend
    raise BackendError(f"{primitive}: backend {_forced[-1]!r} was forced, but {reason}")


def choose(primitive: str, args: Sequence) -> Callable:
    """The function that runs this call. Raises BackendError as `selected` does."""
    backend = selected(primitive, args)
    function = _implementation(backend, primitive).function
    return _observed(function, primitive, backend) if _observers else function


@cache
def _composites(backend: str) -> Mapping[str, ModuleType]:
    try:
        module = importlib.import_module(f"fastcnn.{backend}")
    except ImportError:
        return {}
    return {} if module.unavailable() else getattr(module, "COMPOSITES", {})


def composite(name: str, x: torch.Tensor, *args) -> ModuleType | None:
    """A backend's module that runs a composition of primitives as one call, or None: they run one by one.

    Whoever watches or compiles is to see the primitives.
    """
    if torch.compiler.is_compiling() or is_watched() or x.numel() == 0:
        return None
    backend = _order((x,))[0]
    module = None if backend == "reference" else _composites(backend).get(name)
    return None if module is None or module.refuses(x, *args) else module


def is_gpu_available() -> bool:
    """Whether torch sees a CUDA device."""
    return torch.cuda.is_available()
