"""The tiny models, under their names for one test, and a folder with data to train them on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastcnn.models import registry
from tests.training.tiny import BUILDERS, write_mnist

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    for builder in BUILDERS:
        registry.register(32)(builder)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as the processes that tests start: torch's own sums depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, here and in child processes, also where the tests run in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a small MNIST in data/."""
    write_mnist(tmp_path / "data")
    return tmp_path
