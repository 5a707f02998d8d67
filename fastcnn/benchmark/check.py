"""What counts as right: the distance from float64, a tolerance per dtype, and stock torch as a yardstick."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Largest ||out - ref|| / ||ref||. Nothing loosens it but a yardstick: a model, or a gradient through an
# activation's kink, may be as far from float64 as twice what stock torch is in the same dtype.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
YARDSTICK_FACTOR = 2.0
# Where stock torch itself is further away than this (bf16 gradients of a random network's first layers are)
# the output judges nobody; but it must be finite, and another output of the case must be one that judges.
YARDSTICK_LIMIT = 0.5
FINITE = 1e300


def relative_errors(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> list[float]:
    """||out - ref|| / ||ref|| of each output; infinite where shapes differ or a value is not finite."""
    if len(outputs) != len(references):
        return [math.inf] * len(references)
    return [_relative_error(output.detach(), reference.detach()) for output, reference in zip(outputs, references)]


def _relative_error(output: Tensor, reference: Tensor) -> float:
    if output.shape != reference.shape:
        return math.inf
    difference = output.to(reference.device, torch.float64) - reference
    error = float(difference.norm() / reference.norm().clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf


def allowed_errors(
    dtype: torch.dtype, outputs: int, yardstick: Sequence[float] | None, is_yardstick: bool = False
) -> list[float]:
    """The largest error of each output, given the yardstick's errors (None: the tolerance alone)."""
    tolerance = TOLERANCES[dtype]
    if yardstick is None or len(yardstick) != outputs or min(yardstick) > YARDSTICK_LIMIT:
        return [tolerance] * outputs
    if is_yardstick:
        return [e if math.isfinite(e) else tolerance for e in yardstick]
    return [max(tolerance, YARDSTICK_FACTOR * e) if e <= YARDSTICK_LIMIT else FINITE for e in yardstick]
