"""BatchNorm whose batch is that of all processes of a group, on GPUs and on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcnn.nn.fused import Unit, run_units


class SyncBatchNorm2d(nn.BatchNorm2d):
    """An nn.BatchNorm2d that shares its batch statistics with the other processes, as nn.SyncBatchNorm does.

    Inside a fused layer the processes gather each convolution's partial sums, not its output. It runs on any device
    and under DistributedDataParallel, which refuses nn.SyncBatchNorm on CPUs; keys and arguments are nn.BatchNorm2d's.
    In eval mode, and while torch.distributed is not initialised, it is one.

    Args:
        process_group: the processes; None: all of them, as they are at each call.

    Shapes: x [N, num_features, H, W]; N may differ between the processes.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: torch.distributed.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input, channels_last.

        Raises:
            TypeError, ValueError: an input that is no [N, num_features, H, W] float tensor.
        """
        return run_units(x, [Unit((), self)])


def convert_sync_batchnorm(module: nn.Module, process_group: torch.distributed.ProcessGroup | None = None) -> nn.Module:
    """Replaces every nn.BatchNorm2d of a model by a SyncBatchNorm2d with the same parameters; returns the model.

    As nn.SyncBatchNorm.convert_sync_batchnorm, with layers that fused blocks take and CPUs run.
    """
    if type(module) is nn.BatchNorm2d:
        synced = SyncBatchNorm2d(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, process_group
        )
        for kind in ("_parameters", "_buffers"):
            setattr(synced, kind, getattr(module, kind))
        return synced.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, process_group))
    return module
