"""Dense blocks of DenseNet-121: a training step against layers that concatenate, and memory as depth grows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastcnn.benchmark import memory, peers
from fastcnn.benchmark.case import OURS, Case, Competitor, Entry, Work
from fastcnn.benchmark.race import RaceResult
from fastcnn.benchmark.suites.common import BATCH, NAMES, normal
from fastcnn.benchmark.targets import Curve, Target
from fastcnn.nn import DenseBlock

if TYPE_CHECKING:
    from fastcnn.benchmark.suites import Options

NAME = "dense"
TITLE = "Dense blocks of DenseNet-121, growth rate 32, batch 8"
NOTES = (
    "A training step of one block, forward and backward; peers are torchvision's block. Floors: computing.",
    "Memory: the peak of one step of a block over 64 channels of 28 x 28 pixels, batch 2, above what it began with;"
    " each in a process of its own.",
)
GROWTH, BOTTLENECK = 32, 4
BLOCKS = ((6, 64, 56), (12, 128, 28), (24, 256, 14), (16, 512, 7))  # layers, channels, pixels
DEPTHS = (8, 16, 32, 64)
TORCH = "torch"
FORMS = {"": False, ", memory_efficient": True}


@lru_cache(maxsize=1)
def _stock(layers: int, channels: int, memory_efficient: bool = False) -> nn.Module:
    from torchvision.models import densenet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return densenet._DenseBlock(layers, channels, BOTTLENECK, GROWTH, 0.0, memory_efficient)


def _ours(layers: int, channels: int, memory_efficient: bool = False) -> nn.Module:
    block = DenseBlock(layers, channels, BOTTLENECK, GROWTH, memory_efficient=memory_efficient)
    block.load_state_dict(_stock(layers, channels).state_dict())
    return block


def _step(block: nn.Module, dtype: torch.dtype, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaf = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        y = block(leaf)
    first = next(p for p in block.parameters() if p.dim() == 4)
    for p in block.parameters():
        p.grad = None
    y.backward(grad.to(y.dtype))
    return y.detach(), leaf.grad, first.grad


def _case(layers: int, channels: int, pixels: int, dtype: torch.dtype, options: Options) -> Case:
    last = channels + layers * GROWTH
    widths = range(channels, last, GROWTH)
    macs = BATCH * pixels**2 * sum(BOTTLENECK * GROWTH * (c + 9 * GROWTH) for c in widths)

    def placed(block: nn.Module) -> nn.Module:
        return block.to(options.device, memory_format=torch.channels_last).train()

    def entry(compiled: bool, ours: bool) -> Entry:
        block = placed(_ours(layers, channels) if ours else copy.deepcopy(_stock(layers, channels)))
        return Entry(partial(_step, torch.compile(block, dynamic=False) if compiled else block, dtype))

    competitors = [
        Competitor(OURS, dtype, partial(entry, False, True)),
        Competitor(peers.EAGER_NHWC, dtype, partial(entry, False, False)),
    ]
    if options.compiles():
        competitors.append(Competitor(peers.COMPILED, dtype, partial(entry, True, False)))

    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        shapes = ((BATCH, channels, pixels, pixels), (BATCH, last, pixels, pixels))
        return tuple(normal(g, s, torch.float32).contiguous(memory_format=torch.channels_last) for s in shapes)

    def reference(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return _step(copy.deepcopy(_stock(layers, channels)).to(x.device).double().train(), torch.float64, x, grad)

    return Case(
        f"block of {layers}, {channels} channels, {pixels}x{pixels} {NAMES[dtype]} train",
        Work(6.0 * macs, 0.0, dtype),
        inputs,
        reference,
        tuple(competitors),
        yardsticks={dtype: peers.EAGER_NHWC},
        tags={"dtype": NAMES[dtype]},
    )


def cases(options: Options) -> Iterator[Case]:
    """A training step of each block in every dtype; the smallest alone when quick."""
    for block in BLOCKS[-1:] if options.quick else BLOCKS:
        for dtype in options.dtypes:
            yield _case(*block, dtype, options)


def _peak_megabytes(ours: bool, depth: int, memory_efficient: bool, device: str) -> float | None:
    block = _ours(depth, 64, memory_efficient) if ours else copy.deepcopy(_stock(depth, 64, memory_efficient))
    block = block.to(device, memory_format=torch.channels_last).train()
    x = torch.randn(2, 64, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    run = partial(_step, block, torch.float32)
    grad = torch.randn_like(block(x).detach())
    run(x, grad)
    peak = memory.peak_bytes(lambda: run(x, grad), device)
    return None if peak is None else peak / 1e6


def curves(options: Options) -> list[Curve]:
    """The peak memory of a step as depth grows, of both forms of our block and of torch's; nothing when quick."""
    if options.quick:
        return []

    def peak(*what: object) -> float | None:
        # CUDA's allocator counts exactly in any process.
        alone = options.device == "cpu"
        return memory.in_new_process(_peak_megabytes, *what) if alone else _peak_megabytes(*what)

    series = {
        f"{name}{form}": [peak(ours, depth, efficient, options.device) for depth in DEPTHS]
        for name, ours in ((OURS, True), (TORCH, False))
        for form, efficient in FORMS.items()
    }
    return [Curve("memory", "Peak memory of a training step of a dense block", "layers", "MB", list(DEPTHS), series)]


def targets(races: list[RaceResult], options: Options, peaks: Curve | None = None) -> list[Target]:
    """Memory per depth: a quarter more than linear from the shallowest block at most, in both forms; torch's beside it."""
    found = []
    if peaks is None:
        return found
    for form in FORMS:
        first, *ours = peaks.series[OURS + form]
        for depth, mine, theirs in zip(DEPTHS[1:], ours, peaks.series[TORCH + form][1:], strict=True):
            if first is not None and mine is not None and theirs is not None:
                bound = round(1.25 * first * depth / DEPTHS[0], 1)
                work = f"block of {depth} layers{form or ', fast'}, peak of a step"
                found.append(Target(work, f"MB; {theirs:.0f} in torch's", bound, mine, True))
    return found
