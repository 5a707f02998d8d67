"""What the machine can do at most, measured: matrix products and copies; and the floor of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from fastcnn.benchmark import machine

# Products whose operands suit every blocking; the best rate of any of them counts.
PRODUCTS = ((2048, 2048, 2048), (6272, 512, 128), (1536, 1536, 1536))


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def best_time(call: Callable[[], object], device: str, seconds: float = 0.4, at_least: int = 5) -> float:
    """The shortest of the calls that fit into the given time; on a GPU, of groups of ten calls."""
    group = 10 if device == "cuda" else 1
    call()
    _synchronise(device)
    best, start, rounds = float("inf"), time.perf_counter(), 0
    while rounds < at_least or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        for _ in range(group):
            call()
        _synchronise(device)
        best = min(best, (time.perf_counter() - before) / group)
        rounds += 1
    return best


def _products(dtype: torch.dtype, device: str, m: int, n: int, k: int) -> list[Callable[[], object]]:
    """torch's product and our own core on one shape."""
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    x, w = a.view(1, m, 1, k).permute(0, 3, 1, 2), b.view(n, k, 1, 1)

    def ours() -> object:
        return torch.ops.fastcnn.pointwise_fwd(x, w, None, None, 0, None, None, 0, None, (1, 1), False)

    return [lambda: a @ b.t(), ours]


@cache
def matrix_peak(dtype: torch.dtype, device: str = "cpu") -> float:
    """The best sustained operations per second of torch's products and of our own core (once per process)."""
    shapes = PRODUCTS if device == "cpu" else ((8192, 8192, 8192), (4096, 4096, 4096))
    with torch.no_grad():
        return max(
            2.0 * m * n * k / best_time(call, device, 0.2)
            for m, n, k in shapes
            for call in _products(dtype, device, m, n, k)
        )


@cache
def copy_bandwidth(device: str = "cpu") -> float:
    """The best bytes read and written per second by a copy that fits no cache (once per process)."""
    size = min(max(4 * machine.last_level_cache(device), 128 << 20), 1 << 30) // 4
    source, target = torch.randn(size, device=device), torch.empty(size, device=device)
    copies = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return max(8.0 * size / best_time(call, device) for call in copies)


def floor(operations: float, traffic: float, dtype: torch.dtype, device: str = "cpu") -> float:
    """The least seconds that the work takes: max(operations / measured peak, bytes / measured bandwidth)."""
    return max(operations / matrix_peak(dtype, device), traffic / copy_bandwidth(device))


def summary(dtypes: tuple[torch.dtype, ...], device: str = "cpu") -> dict:
    """The measured peaks, ready for JSON."""
    rates = {str(dtype).removeprefix("torch."): matrix_peak(dtype, device) for dtype in dtypes}
    return {"matrix_ops_per_s": rates, "copy_bytes_per_s": copy_bandwidth(device)}
