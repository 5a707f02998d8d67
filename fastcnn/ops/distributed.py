"""Batch statistics over the processes of a group: what SyncBatchNorm shares, gathered and merged in rank order."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def _gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[processes, n] of every process's [n], in rank order."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.stack(parts)


def merge_statistics(mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance [C] and number of values per channel over all processes' batches.

    Shifted by the common mean, so that means far from zero cost no digits (Chan, Golub & LeVeque 1979). Processes may
    have batches of different sizes.
    """
    own = torch.cat([mean.double(), var.double(), mean.new_full((1,), count, dtype=torch.float64)])
    parts = _gather(own, group)
    channels = len(mean)
    means, variances, counts = parts[:, :channels], parts[:, channels:-1], parts[:, -1:]
    total = counts.sum()
    merged = (counts * means).sum(0) / total
    spread = (counts * (variances + (means - merged).square())).sum(0) / total
    return merged.to(mean.dtype), spread.to(var.dtype), total


def sum_over(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of every process's tensor, in rank order: the same bits on every process and in every run."""
    return _gather(values.contiguous(), group).double().sum(0).to(values.dtype)
