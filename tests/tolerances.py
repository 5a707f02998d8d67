"""How far a result may be from its float64 reference: ||out - ref|| / ||ref||, by dtype. Nothing loosens it."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; the absolute norm where expected is zero; inf for a NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error, scale = (actual - expected).norm().item(), expected.norm().item()
    if error != error:
        return float("inf")
    return error / scale if scale else error


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "output") -> None:
    """Fails unless shapes agree and the error is within the dtype's tolerance."""
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.2e} in {dtype}, at most {TOLERANCE[dtype]:.0e}"
