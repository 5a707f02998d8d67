"""Which backend runs which primitive: one table, one choice, and an account of it.

A backend is a package with a function of a primitive's name for each primitive that it has, and two questions:
``unavailable() -> str | None`` (why it can run nothing here) and ``refuses(name, args) -> str | None`` (why it will not
run this call: a dtype that it lacks, or a shape for which another backend is measured faster).
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

# Filled by fastcnn.ops.registry.register: the plain-torch implementation of every primitive.
REFERENCES: dict[str, Callable] = {}

PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
BACKENDS = ("cpu", "cuda", "triton", "reference")


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


@cache
def _implementation(backend: str, primitive: str) -> tuple[Callable | None, str]:
    """The backend's function for a primitive, or None and the reason."""
    if backend == "reference":
        return REFERENCES[primitive], ""
    try:
        module = importlib.import_module(f"fastcnn.{backend}")
    except ImportError as error:
        return None, str(error)
    reason = module.unavailable()
    if reason:
        return None, reason
    function = getattr(module, primitive, None)
    return function, "" if function else f"the {backend} backend has no {primitive}"


def refusal(backend: str, primitive: str, args: Sequence) -> str | None:
    """Why a backend will not run this call, or None if it will."""
    if backend == "reference":
        return None
    function, reason = _implementation(backend, primitive)
    if function is None:
        return reason
    return importlib.import_module(f"fastcnn.{backend}").refuses(primitive, args)


def candidates(primitive: str, args: Sequence) -> list[tuple[str, str | None]]:
    """Every backend in order of preference with None if it would run this call, or the reason why not."""
    device = next(a for a in args if isinstance(a, Tensor)).device.type
    order = _forced[-1:] or PREFERENCE.get(device, ("reference",))
    return [(backend, refusal(backend, primitive, args)) for backend in order]


def selected(primitive: str, args: Sequence) -> str:
    """The name of the backend that runs this call.

    Raises:
        BackendError: the forced backend cannot run it.
    """
    for backend, reason in candidates(primitive, args):
        if reason is None:
            return backend
    raise BackendError(f"{primitive}: backend {_forced[-1]!r} was forced, but {reason}")


def choose(primitive: str, args: Sequence) -> Callable:
    """The function that runs this call. Raises BackendError as `selected` does."""
    backend = selected(primitive, args)
    if not _forced and args[0].numel() == 0:
        backend = "reference"
    return _implementation(backend, primitive)[0]


def is_gpu_available() -> bool:
    """Whether torch sees a CUDA device."""
    return torch.cuda.is_available()
