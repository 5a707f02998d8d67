"""Memory: what autograd keeps for backward, and the peak of one call."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastcnn.cpu.memory import empty_cache

M_MMAP_THRESHOLD, MAPPED_FROM = -3, 128 << 10  # mallopt's parameter, and glibc's own first value of it

Result = TypeVar("Result")


def saved_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that the call saves for backward: each storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(storage.nbytes() for storage in storages.values())


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """The most memory that one call holds above what was held before it; None where the system does not tell.

    On a CPU this is the resident set, whoever allocates it: torch, a C++ kernel or another runtime.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # Freed memory that malloc or our own cache keeps would hide what the call takes.
        ctypes.CDLL(None).malloc_trim(0)
        empty_cache()
        Path("/proc/self/clear_refs").write_text("5")  # 5: forget the peak
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        # glibc raises the threshold with every mapping that is freed; then freed memory stays in its heap and counts.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)


def in_new_process(function: Callable[..., Result], *args: object) -> Result:
    """What the function returns in a process of its own, where peak_bytes repeats to a few percent.

    Elsewhere a peak depends on the holes that earlier work left in malloc's heap: a dense block's 84 MB read as 121 to 177.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _start, (torch.get_num_threads(),)) as pool:
        return pool.submit(function, *args).result()
