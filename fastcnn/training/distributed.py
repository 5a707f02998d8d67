"""One process, or the several that torchrun starts: who this one is, and how they agree."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """The processes that train one model together. One process alone is a group of size 1, without torch.distributed."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all processes; `values` may be overwritten."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier()

    @torch.no_grad()
    def share_buffers(self, module: nn.Module) -> None:
        """Gives every process the first one's buffers: each took BatchNorm's statistics of its own images."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The module to train through: the model itself, or one that averages its gradients over the processes."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)


def _device(name: str | None, local_rank: int | None) -> torch.device:
    """The device that an argument means to this process."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, expected a torch device such as cpu or cuda: {error}") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, but torch sees no CUDA device")
    if local_rank is not None:
        device = torch.device("cuda", local_rank)
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {str(device)!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device


@contextlib.contextmanager
def process_group(device: str | None) -> Iterator[Group]:
    """Joins torchrun's processes, if torchrun started this one (RANK, WORLD_SIZE and LOCAL_RANK are set), for a block.

    NCCL connects GPUs and gloo CPUs. A group that is already initialised is used and left as it is.

    Raises:
        ValueError: no such device here.
    """
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not under_torchrun and not dist.is_initialized():
        yield Group(_device(device, None))
        return
    place = _device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    joins = not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Group(place, dist.get_rank(), dist.get_world_size())
    finally:
        if joins:
            dist.destroy_process_group()
