"""What a result depends on: processor, caches, threads, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import fastcnn
from fastcnn import native

PACKAGES = ("torch", "torchvision", "timm", "openvino", "triton", "numpy")
UNKNOWN_CACHE = 32 << 20


def cpu_name() -> str:
    """The processor's name as the kernel reports it."""
    path = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return set(match[1].split()) if match else set()


def matrix_features() -> list[str]:
    """The widest vector unit of this CPU, and what it has for bf16 products."""
    flags = _cpu_flags()
    widest = next((f for f in ("avx512f", "avx2", "asimd") if f in flags), None)
    return [f for f in (widest, "avx512_bf16", "amx_bf16") if f in flags]


def multiplies(dtype: torch.dtype, device: str = "cpu") -> bool:
    """Whether a device has products of a dtype: a CPU without them takes torch minutes for a step in bf16."""
    return device != "cpu" or dtype == torch.float32 or not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_flags())


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMG]?)", text.strip()).groups()
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


@cache
def last_level_cache(device: str = "cpu") -> int:
    """Bytes of the cache nearest to memory; 32 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((_bytes(path.read_text()) for path in sizes), default=UNKNOWN_CACHE)


def commit() -> str:
    """The commit that runs, "-dirty" if the tree differs from it; the version outside a checkout."""
    root = Path(fastcnn.__file__).resolve().parents[1]
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return fastcnn.__version__


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _native_isa() -> str:
    module = native.module()
    return module.isa_active() if module else "no native core"


def describe(device: str = "cpu") -> dict:
    """Everything that a result is meaningless without, ready for JSON."""
    facts = {
        "cpu": cpu_name(),
        "features": matrix_features(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_kernels": _native_isa(),
        "last_level_cache": last_level_cache("cpu"),
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in PACKAGES},
        "fastcnn": fastcnn.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu_l2"] = properties.L2_cache_size
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["cuda"] = torch.version.cuda
    return facts


def slug(facts: dict) -> str:
    """A file name for a machine: what it is, not whose it is."""
    parts = [facts["gpu"]] if "gpu" in facts else [facts["cpu"], *facts["features"][-1:], f"{facts['threads']} threads"]
    text = re.sub(r"\(r\)|\(tm\)|cpu|processor", " ", " ".join(parts), flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
