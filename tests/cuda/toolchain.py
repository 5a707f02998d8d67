"""Compiles the CUDA sources for the tests: with nvcc for its report, with the C++ compiler for the CPU stand-in."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
HERE = Path(__file__).resolve().parent
BUILD = Path(os.environ.get("FASTCNN_TEST_BUILD", ROOT / "build" / "cuda_on_cpu"))

# Enough to see a wrong index, an overflow or a wild pointer; null and object-size would double the compile time and
# see nothing that AddressSanitizer does not. O1 because unoptimised fibers are too slow.
CXX_FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fno-strict-aliasing",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,vptr",
    "-fno-sanitize-recover=all",
    "-DFASTCNN_CUDA_ON_CPU",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v"]


def kernels() -> list[Path]:
    """The .cu files."""
    return sorted(CUDA.glob("*.cu"))


def _digest(*parts: str) -> str:
    digest = hashlib.sha256(" ".join(parts).encode())
    for path in sorted([*CUDA.iterdir(), HERE / "cuda_on_cpu.h", HERE / "driver.cpp"]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def build_driver() -> Path:
    """The stand-in executable, built once per state of the sources. Raises RuntimeError with the compiler's words."""
    compiler = os.environ.get("CXX", "g++")
    version = _run([compiler, "--version"])
    directory = BUILD / _digest(version, *CXX_FLAGS)
    executable = directory / "driver"
    if executable.exists():
        return executable
    directory.mkdir(parents=True, exist_ok=True)
    hosts = [path for path in sorted(CUDA.glob("*.cpp")) if path.name != "bindings.cpp"]
    sources = [*kernels(), *hosts, HERE / "driver.cpp"]

    def compile_one(source: Path) -> str:
        target = directory / f"{source.name}.o"
        _run([compiler, *CXX_FLAGS, f"-I{CUDA}", f"-I{HERE}", "-x", "c++", "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = directory / f"driver.{os.getpid()}"
    _run([compiler, "-fsanitize=address,undefined", *objects, "-o", str(partial)])
    partial.rename(executable)
    return executable


@dataclass(frozen=True)
class KernelReport:
    """What ptxas says of one kernel."""

    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int


_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s+: Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def nvcc() -> str | None:
    """Path of nvcc, or None."""
    return shutil.which("nvcc")


def compile_cubin(source: Path, arch: str, output: Path) -> list[KernelReport]:
    """Compiles one .cu to machine code for one architecture and reads ptxas' report."""
    command = [nvcc(), *NVCC_FLAGS, f"-arch={arch}", f"-I{CUDA}", "-cubin", str(source), "-o", str(output)]
    text = _run(command)
    reports = []
    for match in _REPORT.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        reports.append(
            KernelReport(
                match["name"],
                int(match["registers"]),
                int(match["stack"]),
                int(match["stores"]) + int(match["loads"]),
                int(shared[1]) if shared else 0,
            )
        )
    return reports
