"""The native module as a file: what it links, what it shares with torch, what its objects may not hold."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fastcnn import native
from fastcnn.cpu.measured import vendor

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / sysconfig.get_config_var("SOABI") / "CMakeFiles"
# What every Linux has, the compiler's own libraries, and the OpenMP runtime that torch brings too.
ALLOWED = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp|asan|ubsan))\.so[.\d]*")

needs_binutils = pytest.mark.skipif(
    not (shutil.which("readelf") and shutil.which("nm")), reason="needs readelf and nm (binutils)"
)


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def module_path() -> Path:
    module = native.module()
    if module is None:
        pytest.skip("fastcnn was installed without its native core")
    return Path(module.__file__)


@needs_binutils
def test_links_neither_torch_nor_the_cuda_runtime(module_path: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", module_path))
    assert "libgomp.so.1" in needed
    assert [name for name in needed if not ALLOWED.fullmatch(name)] == []


@needs_binutils
def test_wants_no_symbol_of_torch_or_cuda(module_path: Path) -> None:
    undefined = output("nm", "-D", "--undefined-only", module_path)
    assert re.findall(r" U (_ZNK?(?:2at|3c10|5torch)\w*|cuda[A-Z]\w*|cu[A-Z]\w*)", undefined) == []


@needs_binutils
def test_exports_only_its_entry_point(module_path: Path) -> None:
    # Strong symbols: instantiations of the C++ library's templates are weak and visible whatever the flags.
    symbols = output("nm", "-D", "--defined-only", module_path)
    assert re.findall(r" [TDBR] (\S+)$", symbols, re.MULTILINE) == ["PyInit__C"]


def test_no_source_includes_a_torch_header() -> None:
    header = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)/', re.MULTILINE)
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources
    assert [path for path in sources if header.search(path.read_text())] == []


def test_only_bindings_know_python() -> None:
    header = re.compile(r'^\s*#\s*include\s*[<"](pybind11/|Python\.h|bindings/)', re.MULTILINE)
    sources = {path for path in (ROOT / "csrc").rglob("*.*") if header.search(path.read_text())}
    assert sources == {*(ROOT / "csrc/bindings").iterdir(), ROOT / "csrc/cuda/bindings.cpp"}


@needs_binutils
def test_no_object_of_an_instruction_set_leaks_inline_functions() -> None:
    """The linker keeps one copy of a weak function: an AVX-512 one would kill older machines."""
    objects = [path for path in OBJECTS.glob("fastcnn_*.dir/**/*.o") if "fastcnn_portable.dir" not in path.parts]
    if not objects:
        pytest.skip("no objects: the module was not built in this tree")
    leaks = {}
    for path in objects:
        weak = re.findall(r" W (.+)$", output("nm", "-C", "--defined-only", path), re.MULTILINE)
        if weak:
            leaks[str(path.relative_to(OBJECTS))] = weak
    assert leaks == {}


def test_shares_the_openmp_runtime_of_torch(module_path: Path) -> None:
    code = "from fastcnn import native; native.module(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert len(set(re.findall(r"\S*/lib(?:g|i|)omp\S*", maps))) == 1


def test_the_fastest_instruction_set_is_chosen(module_path: Path) -> None:
    """The newest, except that without AMX Intel's bf16 dot products are slower than float32."""
    code = "from fastcnn import native; m = native.module(); print(m.isa_active(), *m.isa_available())"
    environment = {key: value for key, value in os.environ.items() if key != "FASTCNN_ISA"}
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    chosen, *available = run.stdout.split()
    if vendor() == "GenuineIntel" and available[-1] == "avx512_bf16":
        available.pop()
    assert chosen == available[-1]
