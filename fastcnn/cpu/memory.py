"""Memory for large CPU outputs that is used again, in huge pages where the system has them.

glibc returns blocks of this size to the system and the next call faults every page in anew: a fresh 88 MB output costs
20.6 ms to write where one that was written before costs 3.5 (measured, 2 cores). CUDA's allocator keeps blocks for the
same reason. A block is free again when no tensor's storage refers to it any more.
"""

from __future__ import annotations

import mmap
import os
import threading

import torch
from torch import Tensor

# Below this size malloc serves from its heap without faults, and cheaper than a search here.
SMALLEST = 1 << 20
_GRAIN = 64 << 10  # a huge page would waste a quarter of a 6 MB output
_SLACK = 8  # a block serves what is at most 1/8 smaller


class _Block:
    __slots__ = ("idle_uses", "size", "storage")

    def __init__(self, size: int) -> None:
        self.size = size
        pages = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        self.storage = torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()
        self.idle_uses = self.uses()

    def uses(self) -> int:
        return torch._C._storage_Use_Count(self.storage._cdata)


class BlockCache:
    """Blocks in use and blocks kept for the next output of about their size.

    Args:
        limit: bytes that idle blocks may hold together; more are given back to the system, oldest first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
        """An uninitialised tensor of ``size`` bytes in a block that no tensor uses."""
        with self._lock:
            storage = self._take(size).storage
            return torch.empty(0, dtype=dtype).set_(storage, 0, shape, stride)

    def _take(self, size: int) -> _Block:
        size = (size + _GRAIN - 1) // _GRAIN * _GRAIN
        for block in self._blocks:
            if size <= block.size <= size + size // _SLACK and block.uses() == block.idle_uses:
                return block
        self.trim(self.limit)
        block = _Block(size)
        self._blocks.append(block)
        return block

    def trim(self, limit: int = 0) -> None:
        """Gives idle blocks back to the system until they hold no more than ``limit`` bytes."""
        idle = [block for block in self._blocks if block.uses() == block.idle_uses]
        held = sum(block.size for block in idle)
        for block in idle:
            if held <= limit:
                break
            self._blocks.remove(block)
            held -= block.size

    def held(self) -> int:
        """Bytes in all blocks, in use or idle."""
        return sum(block.size for block in self._blocks)


def _limit() -> int:
    value = os.environ.get("FASTCNN_CACHE_MB", "2048")
    if not value.isdigit():
        raise ValueError(f"FASTCNN_CACHE_MB: got {value!r}, expected a whole number of MiB (0 keeps nothing)")
    return int(value) << 20


CACHE = BlockCache(_limit())


def empty_cache() -> None:
    """Gives the memory of idle blocks back to the system."""
    CACHE.trim()


def empty_nhwc(n: int, c: int, h: int, w: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last tensor [n, c, h, w] in like's dtype unless given; a large one in memory used before."""
    dtype = dtype or like.dtype
    size = n * c * h * w * dtype.itemsize
    if size < SMALLEST or not CACHE.limit:
        return torch.empty((n, c, h, w), dtype=dtype, memory_format=torch.channels_last)
    return CACHE.empty((n, c, h, w), (h * w * c, 1, w * c, c), dtype, size)


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised tensor in a dense x's dtype and layout; a large one in memory used before."""
    size = x.numel() * x.element_size()
    if size < SMALLEST or not CACHE.limit:
        return torch.empty_like(x)
    return CACHE.empty(tuple(x.shape), x.stride(), x.dtype, size)
