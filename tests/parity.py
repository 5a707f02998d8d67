"""How far stock torch's own float32 is from float64: what a training step of ours is measured against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.tolerances import relative_error

Results = dict[str, Tensor]


def stock_errors(
    step: Callable[[Tensor, torch.memory_format], Results], x: Tensor, expected: Results
) -> dict[str, float]:
    """The largest error of each result over stock torch's float32 runs: both layouts, and an input one bit away.

    One pixel on the other side of a ReLU's kink moves every gradient before it by 1e-3, and which pixel that is differs
    between stock's own two layouts: Xception's gradients are 6e-6 off in one and 4e-3 in the other.
    """
    runs = [
        step(image.contiguous(memory_format=layout), layout)
        for layout in (torch.contiguous_format, torch.channels_last)
        for image in (x, x * (1 + 2**-22))
    ]
    return {key: max(relative_error(run[key], oracle) for run in runs) for key, oracle in expected.items()}


def farther_than_stock(
    actual: Results, expected: Results, stocks: dict[str, float], floor: float = 1e-6
) -> dict[str, str]:
    """The results of ours more than twice as far from float64 as stock's; errors up to ``floor`` are not compared."""
    found = {}
    for key, oracle in expected.items():
        error, allowed = relative_error(actual[key], oracle), max(2 * stocks[key], floor)
        if not error <= allowed:
            found[key] = f"{key}: relative error {error:.2e}, at most {allowed:.2e}"
    return found
