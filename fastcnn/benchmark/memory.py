"""Memory: what autograd keeps for backward, and the peak of one call."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcnn.cpu.memory import empty_cache


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
