"""Memory for large CPU outputs that is used again, in huge pages where the system has them.

glibc returns blocks of this size to the system and the next call faults every page in anew: a fresh 88 MB output costs
20.6 ms to write where one that was written before costs 3.5 (measured, 2 cores). CUDA's allocator keeps blocks for the
same reason. A block is free again when no tensor's storage refers to it any more.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

# Below this size malloc serves from its heap without faults, and cheaper than a search here.
SMALLEST = 1 << 20
_GRAIN = 64 << 10  # a huge page would waste a quarter of a 6 MB output


class _Block:
    __slots__ = ("idle_uses", "size", "storage")

    def __init__(self, size: int) -> None:
        self.size = size
        # Private, so that a process forked from this one writes to pages of its own; shared ones are rarely huge, either.
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        self.storage = torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()
        self.idle_uses = self.uses()

    def uses(self) -> int:
        return torch._C._storage_Use_Count(self.storage._cdata)


class BlockCache:
    """Blocks in use and blocks kept for the next output of about their size.

    Args:
        limit: bytes that idle blocks may hold together; more are given back to the system, oldest first. None: any.
        smallest: bytes from which on an output lies in a block.
        slack: how much larger than what it serves a block may be, as a part of that.
    """

    def __init__(self, limit: int | None, smallest: int = SMALLEST, slack: float = 1 / 8) -> None:
        self.limit, self.smallest, self._slack = limit, smallest, slack
        self._blocks: list[_Block] = []
        self.renew_lock()

    def empty(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
        """An uninitialised tensor of ``size`` bytes in a block that no tensor uses."""
        with self._lock:
            storage = self._take(size).storage
            return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)

    def serves(self, size: int) -> bool:
        """Whether an output of so many bytes lies in a block."""
        return size >= self.smallest and self.limit != 0

    def owns(self, storage: torch.UntypedStorage) -> bool:
        """Whether that is the memory of a block."""
        with self._lock:
            return any(block.storage.data_ptr() == storage.data_ptr() for block in self._blocks)

    def _take(self, size: int) -> _Block:
        size = (size + _GRAIN - 1) // _GRAIN * _GRAIN
        most = size + size * self._slack
        fitting = (b for b in self._blocks if size <= b.size <= most and b.uses() == b.idle_uses)
        block = min(fitting, key=lambda b: b.size, default=None)
        if block is not None:
            return block
        if self.limit is not None:
            self._trim(self.limit)
        block = _Block(size)
        self._blocks.append(block)
        return block

    def trim(self, limit: int = 0) -> None:
        """Gives idle blocks back to the system until they hold no more than ``limit`` bytes."""
        with self._lock:
            self._trim(limit)

    def _trim(self, limit: int) -> None:
        idle = [block for block in self._blocks if block.uses() == block.idle_uses]
        held = sum(block.size for block in idle)
        for block in idle:
            if held <= limit:
                break
            self._blocks.remove(block)
            held -= block.size

    def held(self) -> int:
        """Bytes in all blocks, in use or idle."""
        with self._lock:
            return sum(block.size for block in self._blocks)

    def renew_lock(self) -> None:
        """For a process that was forked while another thread held it."""
        self._lock = threading.RLock()  # whoever sees torch's ops sees those of `empty`, and asks `owns`


def _limit() -> int:
    value = os.environ.get("FASTCNN_CACHE_MB", "2048")
    if not value.isdigit():
        raise ValueError(f"FASTCNN_CACHE_MB: got {value!r}, expected a whole number of MiB (0 keeps nothing)")
    return int(value) << 20


CACHE = BlockCache(_limit())
_thread = threading.local()


class Holders:
    """What else keeps memory for later calls: objects that can `forget` it and, after a fork, `renew_lock`."""

    def __init__(self) -> None:
        self._held: weakref.WeakSet = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, holder: object) -> None:
        """Remembers a holder as long as it lives."""
        with self._lock:
            self._held.add(holder)

    def all(self) -> list:
        """Those that live."""
        with self._lock:
            return list(self._held)

    def renew_locks(self) -> None:
        """For a process that was forked while another thread held one."""
        self._lock = threading.Lock()
        CACHE.renew_lock()
        for holder in self.all():
            holder.renew_lock()


HOLDERS = Holders()
os.register_at_fork(after_in_child=HOLDERS.renew_locks)


@contextlib.contextmanager
def allocating_from(cache: BlockCache) -> Iterator[None]:
    """Within the block this thread's outputs lie in that cache's blocks."""
    before = _current()
    _thread.cache = cache
    try:
        yield
    finally:
        _thread.cache = before


def _current() -> BlockCache:
    return getattr(_thread, "cache", CACHE)


def empty_cache() -> None:
    """Gives the memory of idle blocks, and what optimized models keep between their calls, back to the system."""
    for holder in HOLDERS.all():
        holder.forget()
    CACHE.trim()


def empty_nhwc(n: int, c: int, h: int, w: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last tensor [n, c, h, w] in like's dtype unless given; a large one in memory used before."""
    dtype, cache = dtype or like.dtype, _current()
    size = n * c * h * w * dtype.itemsize
    if not cache.serves(size):
        return torch.empty((n, c, h, w), dtype=dtype, device="cpu", memory_format=torch.channels_last)
    return cache.empty((n, c, h, w), (h * w * c, 1, w * c, c), dtype, size)


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised tensor in a dense x's dtype and layout; a large one in memory used before."""
    size, cache = x.numel() * x.element_size(), _current()
    if not cache.serves(size):
        return torch.empty_like(x)
    return cache.empty(tuple(x.shape), x.stride(), x.dtype, size)
