"""Where the comparisons run: on a GPU, or in Triton's interpreter (in a process of their own: test_interpreter.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastcnn import triton as backend
from fastcnn.triton.launch import INTERPRETED


def _repair_interpreter() -> None:
    """Triton 3.6's interpreter converts one-element arrays to integers in a way that NumPy 2.4 no longer allows."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def repaired(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = repaired


if INTERPRETED:
    _repair_interpreter()


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device of a comparison's tensors."""
    if request.param == "interpreter":
        if not INTERPRETED:
            pytest.skip("runs under TRITON_INTERPRET=1, in a process that test_interpreter.py starts")
        return "cpu"
    if INTERPRETED:
        pytest.skip("the interpreter is on (TRITON_INTERPRET=1)")
    if backend.unavailable():
        pytest.skip(f"needs a GPU: {backend.unavailable()}")
    return "cuda"


@pytest.fixture
def gpu() -> str:
    """For what only a GPU can show."""
    if INTERPRETED or backend.unavailable():
        pytest.skip(f"needs a GPU: {backend.unavailable() or 'the interpreter is on'}")
    return "cuda"


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Every new tensor holds NaN, so a result that a kernel does not write cannot pass by luck."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
