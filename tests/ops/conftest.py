"""Backends as fixtures: the reference, and the C++ kernels on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastcnn import backends, native
from fastcnn.cpu import memory


def _names() -> list[str]:
    module = native.module()
    return ["reference", "unfused", *([f"cpu-{isa}" for isa in module.isa_available()] if module else ["cpu"])]


@pytest.fixture(params=_names())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend to force: "reference", "unfused", or "cpu" with one instruction set active throughout."""
    name, _, isa = request.param.partition("-")
    module = native.module()
    if module is None and name != "reference":
        pytest.skip("native module not built")
    if not isa:
        yield name
        return
    before = module.isa_active()
    module.set_isa(isa)
    yield name
    assert module.isa_active() == isa
    module.set_isa(before)


@pytest.fixture
def preferred(backend: str) -> Iterator[None]:
    """The backend where it has the primitive; what it lacks falls back to the reference, as in a user's call."""
    if backend == "unfused":
        pytest.skip("the unfused backend has few primitives; it takes part where the cpu backend leaves calls to it")
    if backend == "reference":
        with backends.force(backend):
            yield
    else:
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
