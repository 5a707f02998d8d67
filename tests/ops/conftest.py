"""Backends as fixtures: the reference, and the C++ kernels on every instruction set that this machine has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from fastcnn import backends, native
from fastcnn.cpu import memory


def _cpu_names() -> list[str]:
    module = native.module()
    return [f"cpu-{isa}" for isa in module.isa_available()] if module else ["cpu"]


@contextlib.contextmanager
def _isa_of(name: str) -> Iterator[None]:
    """The instruction set in "cpu-<isa>" is active throughout."""
    module, isa = native.module(), name.partition("-")[2]
    if module is None:
        pytest.skip("native module not built")
    if not isa:
        yield
        return
    before = module.isa_active()
    module.set_isa(isa)
    yield
    assert module.isa_active() == isa
    module.set_isa(before)


@pytest.fixture(params=["reference", "unfused", *_cpu_names()])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend to force: "reference", "unfused", or "cpu" with one instruction set."""
    if request.param == "reference":
        yield "reference"
        return
    with _isa_of(request.param):
        yield request.param.partition("-")[0]


@pytest.fixture(params=["reference", *_cpu_names()])
def preferred(request: pytest.FixtureRequest) -> Iterator[None]:
    """A user's call: of the cpu backend with one instruction set what it takes, the rest of those after it."""
    with backends.force("reference") if request.param == "reference" else _isa_of(request.param):
        yield


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every new tensor holds NaN, so a result that a kernel does not write cannot pass by luck."""
    monkeypatch.setattr(memory.CACHE, "limit", 0)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
