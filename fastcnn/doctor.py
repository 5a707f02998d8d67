"""``fastcnn doctor``: what was built, what this machine has, what is missing and the command that adds it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastcnn import __version__, native

REBUILD = "pip install -e ."  # in fastcnn's source tree
PACKAGES = ("torch", "triton", "numpy", "torchvision", "timm", "safetensors", "openvino")

# What /proc/cpuinfo must list for each instruction set that the CPU kernels are compiled for.
ISA_FLAGS = {
    "portable": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_bf16"),
}

# An extra, the distributions in it that are optional, and what they are for.
EXTRAS = {
    "demo": (("torchvision", "timm", "scikit-image", "matplotlib", "safetensors"), "fastcnn demo"),
    "bench": (("openvino", "pytest-benchmark"), "OpenVINO beside fastcnn in fastcnn bench"),
}


@dataclass(frozen=True)
class Missing:
    """Something that is not there, what goes without it, and the command that adds it."""

    what: str
    effect: str
    command: str


@dataclass(frozen=True)
class Report:
    """Sections of (name, value) rows, and what is missing."""

    sections: dict[str, list[tuple[str, str]]]
    missing: list[Missing]

    def __str__(self) -> str:
        lines = []
        for title, rows in self.sections.items():
            lines += [title, *(f"  {name}: {value}" for name, value in rows)]
        lines += [f"missing: {m.what} ({m.effect}): {m.command}" for m in self.missing]
        return "\n".join(lines)


@cache
def _native() -> tuple[ModuleType | None, str]:
    """The native module, or None and what its loading said."""
    try:
        return native.module(), ""
    except ImportError as error:
        return None, str(error)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _built(module: ModuleType | None, key: str) -> list[str]:
    """The names in a comma-separated field of build_info()."""
    return [name for name in module.build_info()[key].split(",") if name] if module else []


def _cpu() -> tuple[str, set[str]]:
    """The processor's name and its feature flags, from /proc/cpuinfo where there is one."""
    path = Path("/proc/cpuinfo")
    fields = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, set(fields.get("flags", fields.get("Features", "")).split())


def cpu_isas() -> list[str]:
    """The instruction sets of ISA_FLAGS that this CPU has, weakest first; each includes those before it."""
    flags = _cpu()[1]
    found = []
    for isa, needed in ISA_FLAGS.items():
        if not flags.issuperset(needed):
            break
        found.append(isa)
    return found


def _native_rows() -> list[tuple[str, str]]:
    module, error = _native()
    if module is None:
        return [("native core", f"does not load: {error}" if error else "not built: a pure-Python install")]
    info = module.build_info()
    rows = [
        ("native core", str(module.__file__)),
        ("compiler", info["compiler"]),
        ("CPU kernels", _listed(_built(module, "isas"))),
        ("CUDA kernels", _listed(f"sm_{arch}" for arch in _built(module, "cuda_archs"))),
    ]
    if info["nvcc"]:
        rows.append(("nvcc", info["nvcc"]))
    if info["sanitize"]:
        rows.append(("sanitizers", info["sanitize"]))
    return rows


def _machine_rows() -> list[tuple[str, str]]:
    module, _ = _native()
    forced = os.environ.get("FASTCNN_ISA")
    chosen = module.isa_active() if module else "none: no native core"
    cores = len(os.sched_getaffinity(0))
    rows = [
        ("CPU", f"{_cpu()[0]}, {cores} cores, of which torch uses {torch.get_num_threads()}"),
        ("instruction sets of the CPU", _listed(cpu_isas())),
        ("with kernels", _listed(module.isa_available()) if module else "none"),
        ("chosen", f"{chosen} (FASTCNN_ISA={forced})" if forced else chosen),
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        rows.append((f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}"))
    return rows if torch.cuda.is_available() else [*rows, ("GPU", "none that torch can use")]


def _version_rows() -> list[tuple[str, str]]:
    rows = [("fastcnn", __version__), ("python", platform.python_version())]
    rows += [(name, _version(name) or "not installed") for name in PACKAGES]
    rows.append(("torch's CUDA", torch.version.cuda or "none: a CPU build"))
    return [*rows, ("nvcc on this machine", shutil.which("nvcc") or "none")]


def _missing_native(module: ModuleType | None, error: str) -> list[Missing]:
    if error:
        command = "unset FASTCNN_ISA" if "FASTCNN_ISA" in error else REBUILD
        return [Missing("native core", "it is there, but does not load", command)]
    if module is None:
        compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
        first = "" if compiler else "apt-get install g++ && "
        return [Missing("native core", "on a CPU everything runs on torch's own kernels", first + REBUILD)]
    lost = [isa for isa in cpu_isas() if isa not in _built(module, "isas")]
    if lost:
        command = f"CXX=<a newer g++> {REBUILD}"
        return [Missing(f"CPU kernels for {_listed(lost)}", "the compiler does not know them", command)]
    return []


def _missing_gpu(module: ModuleType | None) -> list[Missing]:
    """What a GPU that torch can use goes without."""
    if not torch.cuda.is_available():
        return []
    missing = []
    if _version("triton") is None:
        missing.append(Missing("triton", "the Triton backend", "pip install triton"))
    archs = _built(module, "cuda_archs")
    build = f"FASTCNN_CUDA=on {REBUILD}"
    if not archs:
        first = "" if shutil.which("nvcc") else "apt-get install nvidia-cuda-toolkit && "
        missing.append(Missing("CUDA kernels", "GPU work runs on Triton alone", first + build))
    elif not _runs(archs, arch := _capability()):
        command = f"FASTCNN_CUDA_ARCHS={arch} {build}"
        missing.append(Missing(f"CUDA kernels for sm_{arch}", "GPU work runs on Triton alone", command))
    return missing


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _runs(archs: list[str], capability: int) -> bool:
    """Whether kernels for these run here: a plain one serves later GPUs too, a suffixed one (90a) its own."""
    return any(a.rstrip("af") == str(capability) or (a.isdigit() and int(a) <= capability) for a in archs)


def _missing_packages() -> list[Missing]:
    missing = []
    for extra, (names, purpose) in EXTRAS.items():
        absent = [name for name in names if _version(name) is None]
        if absent:
            missing.append(Missing(_listed(absent), purpose, f"pip install 'fastcnn[{extra}]'"))
    return missing


def report() -> Report:
    """What was built, what this machine has, the versions, and what is missing."""
    module, error = _native()
    return Report(
        {"Built": _native_rows(), "Machine": _machine_rows(), "Versions": _version_rows()},
        [*_missing_native(module, error), *_missing_gpu(module), *_missing_packages()],
    )


def main(console: Console | None = None) -> int:
    """Prints the report; 1 if a native core is there and does not load, else 0."""
    console = console or Console()
    found = report()
    for title, rows in found.sections.items():
        table = Table(title=title, title_justify="left", show_header=False, min_width=60)
        for name, value in rows:
            table.add_row(name, escape(value))
        console.print(table)
    if not found.missing:
        console.print("Nothing is missing.")
    for item in found.missing:
        console.print(f"[bold]Missing:[/] {item.what} [dim]({item.effect})[/]")
        console.print(f"    {item.command}", markup=False, soft_wrap=True)
    return 1 if _native()[1] else 0
