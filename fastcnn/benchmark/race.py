"""One piece of work, several ways to do it: checked against float64, then timed in turn (A B C A B C ...).

Inputs are fresh random numbers, in as many sets as it takes to exceed the last-level cache; each call takes
the next set: nobody reads what a competitor has just left in the cache.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastcnn.benchmark import machine
from fastcnn.benchmark.case import OURS, Budget, Case, Competitor, Entry, tensors_of
from fastcnn.benchmark.check import allowed_errors, relative_errors

MAX_SETS = 256
POOL_BYTES = 1 << 30
WARM_BELOW = 0.05  # seconds: a call shorter than this is run once untimed after another competitor's turn
LAP_SECONDS = 0.02


@dataclass
class Entrant:
    """A competitor in a race: its entry, its inputs, its samples, or why it does not run."""

    competitor: Competitor
    entry: Entry | None = None
    sets: list[tuple] = field(default_factory=list)
    errors: list[float] | None = None
    refused: str | None = None
    samples: list[float] = field(default_factory=list)
    estimate: float = 0.0
    extra: dict = field(default_factory=dict)
    turn: int = 0

    def next_set(self) -> tuple:
        """The next input set in turn."""
        self.turn += 1
        return self.sets[self.turn % len(self.sets)]


class CpuClock:
    """Times calls with the wall clock, a few in a row."""

    device = "cpu"

    def prepare(self, entrant: Entrant) -> None:
        """Estimates how long a call takes."""
        args = entrant.next_set()
        start = time.perf_counter()
        entrant.entry.run(*args)
        entrant.estimate = time.perf_counter() - start

    def lap(self, entrant: Entrant) -> list[float]:
        """A turn. The previous competitor's threads still spin for a moment: hence the untimed call."""
        run, times = entrant.entry.run, []
        calls = max(1, min(50, int(LAP_SECONDS / max(entrant.estimate, 1e-9))))
        if entrant.estimate < WARM_BELOW:
            run(*entrant.next_set())
        for _ in range(calls):
            args = entrant.next_set()
            start = time.perf_counter()
            output = run(*args)
            times.append(time.perf_counter() - start)
            del output  # outside the timing, and before the next call needs the memory
        return times


@dataclass(frozen=True)
class RaceResult:
    """What a race measured: per competitor the samples' summary or a refusal, and the floor."""

    name: str
    tags: dict
    count: int
    operations: float
    traffic: float
    floor: float
    rows: dict[str, dict]

    def median(self, name: str) -> float | None:
        """A competitor's median seconds, or None where it did not run."""
        return self.rows.get(name, {}).get("median")

    def peers(self) -> list[str]:
        """Those who ran and are not ours."""
        return [n for n, row in self.rows.items() if row.get("median") and not n.startswith(OURS)]

    def ours(self) -> float | None:
        """The better median of our own ways."""
        times = [self.median(n) for n in self.rows if n.startswith(OURS)]
        return min((t for t in times if t), default=None)

    def ratio(self, peer: str) -> float | None:
        """How many times as long as ours a peer takes."""
        ours, theirs = self.ours(), self.median(peer)
        return theirs / ours if ours and theirs else None

    def ratio_to_best(self, peers: Sequence[str] | None = None) -> float | None:
        """How many times as long as ours the fastest peer (of those named) takes."""
        ratios = [self.ratio(p) for p in (self.peers() if peers is None else peers)]
        return min((r for r in ratios if r), default=None)

    def fraction_of_floor(self) -> float | None:
        """floor / our time: 1 is what the machine can do at most."""
        ours = self.ours()
        return self.floor / ours if ours else None


def input_sets(case: Case, device: str, seed: int = 0) -> list[tuple[Tensor, ...]]:
    """Fresh random inputs in float32, in so many sets that together they exceed the last-level cache."""
    generator = torch.Generator().manual_seed(seed)
    first = case.inputs(generator)
    # A competitor's copy of a set may be in half the width.
    size = sum(t.numel() * case.work.dtype.itemsize for t in first)
    wanted = math.ceil(1.25 * machine.last_level_cache(device) / max(size, 1))
    sets = max(2, min(wanted, MAX_SETS, POOL_BYTES // max(size, 1)))
    return [first, *(case.inputs(generator) for _ in range(sets - 1))]


def _convert(t: Tensor, dtype: torch.dtype, layout: str, device: str) -> Tensor:
    t = t.to(device, dtype if t.is_floating_point() else t.dtype)
    if t.dim() != 4:
        return t
    return t.contiguous(memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)


class Race:
    """Builds a case's competitors, refuses those whose result is wrong, and times the rest in turn."""

    def __init__(self, case: Case, device: str = "cpu", clock: CpuClock | None = None):
        self.case, self.device, self.clock = case, device, clock or CpuClock()
        self.entrants = [Entrant(c) for c in case.competitors]

    def entrant(self, name: str) -> Entrant:
        """The entrant of that name."""
        return next(e for e in self.entrants if e.competitor.name == name)

    def runners(self) -> list[Entrant]:
        """Those who were not refused."""
        return [e for e in self.entrants if e.refused is None]

    def start(self) -> None:
        """Makes inputs, builds the competitors and checks them; whoever fails is refused with a reason."""
        for entrant in self.entrants:
            self._build(entrant)
        if not self.runners():
            return
        self._make_inputs()
        self._check()
        for entrant in self.runners():
            try:
                self.clock.prepare(entrant)
            except Exception as error:  # a competitor's own failure must not end the race
                entrant.refused = f"failed: {_first_line(error)}"

    def _make_inputs(self) -> None:
        masters = input_sets(self.case, self.device)
        self._reference_inputs = masters[0]
        pools: dict[tuple, list[tuple]] = {}
        for entrant in self.runners():
            c = entrant.competitor
            key = (c.takes or c.dtype, c.layout)
            if key not in pools:
                pools[key] = [tuple(_convert(t, *key, self.device) for t in s) for s in masters]
            entrant.sets = [c.prepare(s) for s in pools[key]] if c.prepare else pools[key]

    def _build(self, entrant: Entrant) -> None:
        try:
            entrant.entry = entrant.competitor.build()
        except Exception as error:  # not installed, no compiler, not supported: the others still race
            entrant.refused = f"not available: {_first_line(error)}"

    def _check(self) -> None:
        # On the device: its float64 convolutions are as good as the CPU's, and far faster.
        moved = (t.to(self.device) for t in self._reference_inputs)
        inputs = (t.double() if t.is_floating_point() else t for t in moved)
        references = tensors_of(self.case.reference(*inputs))
        for entrant in self.runners():
            try:
                outputs = entrant.entry.collect(entrant.entry.run(*entrant.sets[0]))
                entrant.errors = relative_errors(tensors_of(outputs), references)
            except Exception as error:  # as above
                entrant.refused = f"failed: {_first_line(error)}"
        for entrant in self.runners():
            allowed = self._allowed(entrant.competitor, len(references))
            for error, limit in zip(entrant.errors, allowed):
                if not error <= limit:
                    entrant.refused = f"wrong: error {error:.1e}, allowed {limit:.1e}"

    def _allowed(self, competitor: Competitor, outputs: int) -> list[float]:
        name = self.case.yardsticks.get(competitor.dtype)
        errors = self.entrant(name).errors if name else None
        return allowed_errors(competitor.dtype, outputs, errors, name == competitor.name)

    def lap(self, name: str) -> float:
        """One turn of one competitor; the median of its times, which are kept."""
        entrant = self.entrant(name)
        times = self.clock.lap(entrant)
        entrant.samples += times
        return statistics.median(times)

    def run(self, budget: Budget, tick: Callable[[float], None] = lambda done: None) -> RaceResult:
        """start(), then rounds of one turn each until the budget is spent; `tick` hears the share done."""
        self.start()
        names = [e.competitor.name for e in self.runners()]
        gc.collect()
        gc.disable()
        try:
            start, rounds = time.perf_counter(), 0
            while names and rounds < budget.max_rounds:
                elapsed = time.perf_counter() - start
                spent = elapsed / max(budget.seconds * len(names), 1e-9)
                if (rounds >= budget.min_rounds and spent > 1) or (rounds and elapsed > budget.max_seconds):
                    break
                tick(min(spent, rounds / budget.min_rounds, 1.0))
                for name in names:
                    self.lap(name)
                rounds += 1
        finally:
            gc.enable()
        return self.result()

    def result(self) -> RaceResult:
        """The race so far."""
        work = self.case.work
        rows = {e.competitor.name: _row(e) for e in self.entrants}
        return RaceResult(
            self.case.name, dict(self.case.tags), self.case.count, work.operations, work.traffic,
            work.floor(self.device), rows,
        )  # fmt: skip


def _row(entrant: Entrant) -> dict:
    row = {"errors": entrant.errors, "refused": entrant.refused, **entrant.extra}
    if entrant.samples and entrant.refused is None:
        samples = sorted(entrant.samples)
        quartile = len(samples) // 4
        row |= {
            "median": statistics.median(samples),
            "best": samples[0],
            "quartiles": [samples[quartile], samples[-1 - quartile]],
            "samples": len(samples),
        }
    return row


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
