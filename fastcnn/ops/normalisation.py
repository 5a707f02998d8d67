"""What stands between two convolutions of a chain: scale and shift, constant or from a BatchNorm, and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastcnn.ops.distributed import sum_over

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Affine(NamedTuple):
    """A constant or learnable scale and shift per channel [C]; None is 1 and 0."""

    scale: Tensor | None = None
    shift: Tensor | None = None


class BatchNorm(NamedTuple):
    """What torch.nn.functional.batch_norm takes: affine parameters, running statistics, and how to use them.

    With ``training`` the batch's statistics normalise, and the running ones move towards them by ``momentum``. With a
    process ``group`` the batch is that of all its processes (SyncBatchNorm).
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float
    group: ProcessGroup | None = None


class Kind(NamedTuple):
    """A normalisation without its tensors: what an autograd function keeps as a constant."""

    name: str = "none"  # "none", "affine", "frozen" (running statistics) or "train" (the batch's)
    eps: float = 0.0
    group: ProcessGroup | None = None

    @property
    def trains(self) -> bool:
        """Whether the batch's statistics normalise."""
        return self.name == "train"


class Applied(NamedTuple):
    """The affine map per channel [C] that a normalisation is, and what its backward needs."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    invstd: Tensor | None = None


def _absorbed(bias: Tensor, kind: Kind, scale, shift, var, acc: torch.dtype) -> Tensor | None:
    """The shift after a normalisation that does what it did and what a bias before it does.

    Batch statistics take a bias away again: there it only gets a gradient, which is zero but not None.
    """
    if kind.trains:
        moved = bias * 0 if bias.requires_grad else None
    elif kind.name == "frozen":
        gain = torch.rsqrt(var.to(acc) + kind.eps)
        moved = bias * (gain if scale is None else scale * gain)
    else:
        moved = bias if scale is None else bias * scale.to(acc)
    return shift if moved is None else moved if shift is None else shift.to(acc) + moved


def flatten(
    norm: Affine | BatchNorm | None, bias: Tensor | None, acc: torch.dtype
) -> tuple[Kind, tuple[Tensor | None, ...]]:
    """A normalisation after a bias as its kind and its tensors: scale, shift, mean and variance."""
    kind, scale, shift, mean, var = Kind(), None, None, None, None
    if isinstance(norm, BatchNorm):
        kind = Kind("train", norm.eps, norm.group) if norm.training else Kind("frozen", norm.eps)
        scale, shift = norm.weight, norm.bias
        if not norm.training:
            mean, var = norm.running_mean, norm.running_var
    elif norm is not None and (norm.scale is not None or norm.shift is not None):
        kind, (scale, shift) = Kind("affine"), norm
    if bias is not None:
        shift = _absorbed(bias, kind, scale, shift, var, acc)
        kind = Kind("affine") if kind.name == "none" else kind
    return kind, (scale, shift, mean, var)


def _constant(vector: Tensor | None, acc: torch.dtype) -> Tensor | None:
    """The vector in the accumulation dtype and without a history; itself where it is both."""
    if vector is None or (vector.dtype is acc and not vector.requires_grad):
        return vector
    return vector.detach().to(acc)


def applied(kind: Kind, scale, shift, mean, var, acc: torch.dtype) -> Applied:
    """The map in the accumulation dtype; mean and var are the batch's where the kind trains."""
    scale, shift, mean, var = (_constant(t, acc) for t in (scale, shift, mean, var))
    if kind.name in ("none", "affine"):
        return Applied(scale, shift)
    invstd = (var + kind.eps).rsqrt_()
    full = invstd if scale is None else scale * invstd
    moved = -mean * full if shift is None else torch.addcmul(shift, mean, full, value=-1)
    return Applied(full, moved, mean, invstd)


def gradient_coefficients(
    kind: Kind, norm: Applied, sums: Tensor | None, count: int | Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """coef [4, C] of the gradient prologue, and the gradients of the normalisation's scale and shift.

    With x_hat = (y - mean) * r:  dy = gamma r (dz - sum(dz) / M - x_hat * sum(dz x_hat) / M)   (Ioffe & Szegedy 2015).
    """
    dscale = dshift = None
    if sums is not None:
        dshift = sums[0]
        dscale = sums[1] if norm.invstd is None else sums[1] * norm.invstd
    if norm.scale is None:
        return None, dscale, dshift
    if not kind.trains:
        zero = torch.zeros_like(norm.scale)
        return torch.stack((norm.scale, zero, zero, zero)), dscale, dshift
    # The parameters' gradients stay this process's own.
    shared = sums if kind.group is None else sum_over(sums, kind.group)
    constant, slope = (shared * norm.scale).div_(-count).unbind()
    return torch.stack((norm.scale, slope * norm.invstd.square(), norm.mean, constant)), dscale, dshift


def unbiased(var: Tensor, count: int | Tensor) -> Tensor:
    """The variance that running averages take, from the one that normalises, of count values."""
    return var * (count / (count - 1))


@torch.no_grad()
def update_running_statistics(norms: Sequence[BatchNorm], means: Sequence[Tensor], variances: Sequence[Tensor]) -> None:
    """Exponential moving averages as torch.nn.functional.batch_norm keeps them; those of many normalisations at once.

    means [C] are those of what each normalisation reads, variances [C] theirs, unbiased.
    """
    running, values, momenta = [], [], []
    for norm, mean, var in zip(norms, means, variances, strict=True):
        if norm.running_mean is not None:
            running += (norm.running_mean, norm.running_var)
            values += (mean.to(norm.running_mean.dtype), var.to(norm.running_var.dtype))
            momenta += (norm.momentum, norm.momentum)
    if len(set(momenta)) == 1 and len({id(t) for t in running}) == len(running):
        torch._foreach_lerp_(running, values, momenta[0])
        return
    for old, new, momentum in zip(running, values, momenta, strict=True):
        old.lerp_(new, momentum)
