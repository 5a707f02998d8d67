"""The matrix-product core, through the pointwise convolution, beside torch's linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn import cpu
from fastcnn.benchmark import shapes
from fastcnn.benchmark.case import OURS, Case, Competitor, Entry, Work
from fastcnn.benchmark.race import RaceResult
from fastcnn.benchmark.suites.common import NAMES, normal, weight
from fastcnn.benchmark.targets import Target, mean_ratio

if TYPE_CHECKING:
    from fastcnn.benchmark.suites import Options

NAME = "pointwise"
TITLE = "Matrix-product core: pointwise convolutions as M×N×K"
NOTES = ("`torch linear` is oneDNN in bf16; `torch mm` reads its second operand by rows (in fp32 that is MKL).",)
LINEAR, MM = "torch linear", "torch mm"


def _as_image(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The matrix [M, K] as an NHWC image [1, K, M, 1]."""
    (a,) = inputs
    return (a.view(1, a.shape[0], 1, a.shape[1]).permute(0, 3, 1, 2),)


def _as_matrix(output: object) -> tuple[Tensor, ...]:
    y = output[0] if isinstance(output, tuple) else output
    return (y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]),)


def _ours(w: Tensor, pack: bool) -> Entry:
    w, call = w.view(*w.shape, 1, 1), torch.ops.fastcnn.pointwise_fwd.default
    if pack:
        # A packed weight is no tensor: it goes straight to the backend, as the inference form's do.
        w, call = cpu.pack_pointwise(w, w.dtype), cpu.pointwise_fwd

    def run(x: Tensor) -> object:
        return call(x, w, None, None, 0, None, None, 0, None, (1, 1), False)

    return Entry(run, _as_matrix)


def _packs(device: str) -> bool:
    """Whether the CPU backend runs here and takes weights that were packed beforehand."""
    able = hasattr(cpu, "pack_pointwise") and hasattr(cpu, "pointwise_fwd")
    return device == "cpu" and able and cpu.unavailable() is None


def _case(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> Case:
    master = weight(1, (n, k), dtype)

    def on_device() -> Tensor:
        return master.to(device, dtype)

    def mm() -> Entry:
        w = on_device().t().contiguous()
        return Entry(lambda a: torch.mm(a, w))

    def linear() -> Entry:
        w = on_device()
        return Entry(lambda a: F.linear(a, w))

    competitors = [
        Competitor(OURS, dtype, lambda: _ours(on_device(), False), prepare=_as_image),
        Competitor(LINEAR, dtype, linear),
        Competitor(MM, dtype, mm),
    ]
    if _packs(device):
        packed = Competitor(f"{OURS} packed", dtype, lambda: _ours(on_device(), True), prepare=_as_image)
        competitors.insert(1, packed)
    work = Work(2.0 * m * n * k, dtype.itemsize * (m * k + n * k + m * n), dtype)
    return Case(
        f"{m}×{n}×{k} {NAMES[dtype]}",
        work,
        lambda g: (normal(g, (m, k), dtype),),
        lambda a: (a @ master.to(a).t(),),
        tuple(competitors),
        tags={"dtype": NAMES[dtype], "rate": True},
    )


def cases(options: Options) -> Iterator[Case]:
    """Every product in every dtype; the two smallest when quick."""
    products = shapes.PRODUCTS[3:5] if options.quick else shapes.PRODUCTS
    for dtype in options.dtypes:
        for m, n, k in products:
            yield _case(m, n, k, dtype, options.device)


def targets(races: list[RaceResult], options: Options) -> list[Target]:
    """The core's rates, as ratios of times."""
    if options.device != "cpu":
        return []
    work = "matrix core, geometric mean over the products"
    fp32 = mean_ratio(races, (LINEAR, MM), lambda t: t["dtype"] == "fp32")
    bf16 = mean_ratio(races, (LINEAR,), lambda t: t["dtype"] == "bf16")
    return [
        Target(f"{work}, fp32", "torch's best (MKL)", 1.0, fp32),
        Target(f"{work}, bf16", "torch linear (oneDNN); the goal is 2", 1.3, bf16),
    ]
