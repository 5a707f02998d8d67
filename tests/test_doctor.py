"""`fastcnn doctor` on machines with and without what it looks for."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fastcnn import doctor, native

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _forget_the_module() -> Iterator[None]:
    doctor._native.cache_clear()
    yield
    doctor._native.cache_clear()


def fake_native(monkeypatch: pytest.MonkeyPatch, isas: list[str], archs: list[str]) -> None:
    info = {"compiler": "GNU 12.2.0", "nvcc": "", "sanitize": ""}
    info |= {"isas": ",".join(isas), "cuda_archs": ",".join(archs)}
    module = SimpleNamespace(
        __file__="/somewhere/_C.so",
        build_info=lambda: info,
        isa_available=lambda: isas,
        isa_active=lambda: isas[-1],
    )
    monkeypatch.setattr(native, "module", lambda: module)


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    gpu = SimpleNamespace(name="A GPU", major=capability[0], minor=capability[1], total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def missing(what: str) -> list[doctor.Missing]:
    return [item for item in doctor.report().missing if what in item.what]


def test_this_machine() -> None:
    text = str(doctor.report())
    assert f"torch: {torch.__version__.split('+')[0]}" in text
    module = native.module()
    if module is not None:
        assert f"chosen: {module.isa_active()}" in text
        assert set(module.isa_available()) <= set(doctor.cpu_isas())


def test_prints_tables_and_succeeds() -> None:
    stream = io.StringIO()
    assert doctor.main(Console(file=stream, width=120)) == 0
    for title in ("Built", "Machine", "Versions"):
        assert title in stream.getvalue()


def test_without_the_native_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "module", lambda: None)
    assert "pip install -e ." in missing("native core")[0].command
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert missing("native core")[0].command.startswith("apt-get install g++")
    assert doctor.main(Console(file=io.StringIO())) == 0


def test_a_native_core_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("undefined symbol: [x]")

    monkeypatch.setattr(native, "module", fail)
    stream = io.StringIO()
    assert doctor.main(Console(file=stream, width=120)) == 1
    assert "undefined symbol: [x]" in stream.getvalue()


def test_an_instruction_set_that_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("FASTCNN_ISA: got 'avx9', expected one of portable, avx2")

    monkeypatch.setattr(native, "module", fail)
    assert missing("native core")[0].command == "unset FASTCNN_ISA"


def test_an_instruction_set_that_was_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cpu_isas", lambda: ["portable", "avx2", "avx512"])
    fake_native(monkeypatch, isas=["portable", "avx2"], archs=[])
    assert [item.what for item in missing("CPU kernels")] == ["CPU kernels for avx512"]


@pytest.mark.parametrize(
    ("capability", "archs", "is_missing"),
    [
        ((9, 0), [], True),
        ((9, 0), ["80", "90a"], False),
        ((8, 9), ["80", "90a"], False),
        ((7, 5), ["80", "90a"], True),
        ((12, 0), ["90a"], True),
    ],
)
def test_cuda_kernels_for_this_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], archs: list[str], is_missing: bool
) -> None:
    fake_native(monkeypatch, isas=doctor.cpu_isas(), archs=archs)
    fake_gpu(monkeypatch, capability)
    found = missing("CUDA kernels")
    assert bool(found) == is_missing
    assert all("FASTCNN_CUDA=on" in item.command for item in found)


@pytest.mark.parametrize("extra", doctor.EXTRAS)
def test_extras_are_the_declared_ones(extra: str) -> None:
    declared = set(re.findall(r"^[\w-]+", (ROOT / f"requirements/{extra}.txt").read_text(), re.MULTILINE))
    assert set(doctor.EXTRAS[extra][0]) <= declared
