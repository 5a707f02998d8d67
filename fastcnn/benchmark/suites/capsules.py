"""Capsule votes with three iterations of routing, the size of CapsNet on MNIST, and a training step of CapsNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcnn import ops
from fastcnn.benchmark import machine, memory, peers
from fastcnn.benchmark.case import OURS, Case, Competitor, Entry, Work
from fastcnn.benchmark.race import RaceResult
from fastcnn.benchmark.suites import models
from fastcnn.benchmark.suites.common import NAMES, normal
from fastcnn.benchmark.targets import Target

if TYPE_CHECKING:
    from fastcnn.benchmark.suites import Options

NAME = "capsules"
BATCH, IN_CAPS, IN_DIM, OUT_CAPS, OUT_DIM, ITERATIONS = 100, 1152, 8, 10, 16, 3
TITLE = f"Capsule routing, {IN_CAPS}×{IN_DIM} → {OUT_CAPS}×{OUT_DIM}, {ITERATIONS} iterations, batch {BATCH}"
NOTES = (
    "`train`: forward and backward through all iterations. Floors: making the votes once (three times with backward).",
    "`capsnet`: forward, margin loss and reconstruction, backward; without the optimizer. Floor: computing. "
    "In bf16 only where the CPU has products of it.",
)
EAGER, COMPILED = "eager", "compile"

Routing = Callable[[Tensor, Tensor], Tensor]


def procedure(u: Tensor, weight: Tensor) -> Tensor:
    """Routing by agreement in plain torch, with votes and logits in memory (arXiv 1710.09829, procedure 1)."""
    votes = torch.einsum("bid,iode->bioe", u, weight)
    logits = torch.zeros_like(votes[..., 0])
    for i in range(ITERATIONS):
        s = (logits.softmax(-1)[..., None] * votes).sum(1)
        norm = s.norm(dim=-1, keepdim=True)
        v = norm / (1 + norm.square()) * s
        if i + 1 < ITERATIONS:
            logits = logits + (votes * v[:, None]).sum(-1)
    return v


def _run(function: Routing, train: bool, u: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    if not train:
        return (function(u, weight),)
    leaves = [t.detach().requires_grad_() for t in (u, weight)]
    v = function(*leaves)
    return v.detach(), *torch.autograd.grad(v, leaves, grad)


def _case(train: bool, dtype: torch.dtype, options: Options) -> Case:
    def inputs(g: torch.Generator) -> tuple[Tensor, ...]:
        return (
            normal(g, (BATCH, IN_CAPS, IN_DIM), dtype, 0.3),
            normal(g, (IN_CAPS, OUT_CAPS, IN_DIM, OUT_DIM), dtype, 0.1),
            normal(g, (BATCH, OUT_CAPS, OUT_DIM), dtype),
        )

    def competitor(name: str, build: Callable[[], Routing]) -> Competitor:
        return Competitor(name, dtype, lambda: Entry(partial(_run, build(), train)))

    competitors = [
        competitor(OURS, lambda: partial(ops.capsule_votes_routing, iterations=ITERATIONS)),
        competitor(EAGER, lambda: procedure),
    ]
    if options.compiles():
        competitors.append(competitor(COMPILED, lambda: torch.compile(procedure, dynamic=False)))
    votes = 2.0 * BATCH * IN_CAPS * IN_DIM * OUT_CAPS * OUT_DIM
    direction = "train" if train else "fwd"
    return Case(
        f"routing {direction} {NAMES[dtype]}",
        Work(votes * (3 if train else 1), 0.0, torch.float32),
        inputs,
        lambda *exact: _run(procedure, train, *exact),
        tuple(competitors),
        yardsticks={dtype: EAGER},
        tags={"direction": direction, "dtype": NAMES[dtype]},
    )


def cases(options: Options) -> Iterator[Case]:
    """Routing forward and in training, and a training step of CapsNet, in every dtype; routing forward when quick."""
    for dtype in options.dtypes:
        for train in (False,) if options.quick else (False, True):
            yield _case(train, dtype, options)
        if not options.quick and machine.multiplies(dtype, options.device):
            yield models.training_case("capsnet", dtype, options)


def _peak(function: Routing, train: bool, device: str) -> int | None:
    generator = torch.Generator().manual_seed(7)
    u, weight, grad = (
        normal(generator, shape, torch.float32, 0.3).to(device)
        for shape in (
            (BATCH, IN_CAPS, IN_DIM), (IN_CAPS, OUT_CAPS, IN_DIM, OUT_DIM), (BATCH, OUT_CAPS, OUT_DIM)
        )
    )  # fmt: skip
    _run(function, train, u, weight, grad)
    return memory.peak_bytes(lambda: _run(function, train, u, weight, grad), device)


def _memory_target(train: bool, device: str) -> Target:
    ours = _peak(partial(ops.capsule_votes_routing, iterations=ITERATIONS), train, device)
    theirs = _peak(procedure, train, device)
    measured = 100 * ours / theirs if ours is not None and theirs else None
    megabytes = "" if measured is None else f" ({theirs / 1e6:.0f} MB)"
    direction = "train" if train else "fwd"
    return Target(f"routing {direction} fp32, peak memory", f"% of eager's{megabytes}", 10.0, measured, True)


def targets(races: list[RaceResult], options: Options) -> list[Target]:
    """Ratios to torch.compile, on a GPU to eager torch too, and peaks of memory."""
    found = []
    for race in races:
        if "model" in race.tags:
            found.append(Target(race.name, "the best of torch", 2.0, race.ratio_to_best(peers.TORCH)))
        elif options.device != "cpu":
            found += [
                Target(race.name, EAGER, 10.0, race.ratio(EAGER)),
                Target(race.name, COMPILED, 3.0, race.ratio(COMPILED)),
            ]
        elif race.tags["dtype"] == "fp32":
            bound = 4.0 if race.tags["direction"] == "train" else 5.0
            found.append(Target(race.name, COMPILED, bound, race.ratio(COMPILED)))
    if not options.quick:
        found += [_memory_target(train, options.device) for train in (False, True)]
    return found
