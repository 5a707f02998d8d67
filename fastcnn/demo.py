"""``fastcnn demo``: photographs through MobileNet-v2 and Xception, stock torch beside fastcnn."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from fastcnn.benchmark import memory, peers, photographs, stock
from fastcnn.benchmark.case import Budget, Case, Competitor, Entry, Work
from fastcnn.benchmark.check import relative_errors
from fastcnn.benchmark.race import Race
from fastcnn.explain import explain

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Way:
    """A way to run a model."""

    name: str
    dtype: torch.dtype
    layout: str
    ours: bool


WAYS = (
    Way("eager NCHW fp32", FP32, "nchw", False),
    Way("eager NHWC fp32", FP32, "nhwc", False),
    Way("fastcnn fp32", FP32, "nhwc", True),
    Way("eager NHWC bf16 autocast", BF16, "nhwc", False),
    Way("fastcnn bf16", BF16, "nhwc", True),
)
YARDSTICKS = {FP32: WAYS[0].name, BF16: WAYS[3].name}
LEGEND = (
    "speed-up: over the faster eager way in that precision; memory: of one call on all photographs, without "
    "weights; difference: from the stock model in float64, relative"
)
# Two minutes for everything: checks, memory and the first calls take about half of them.
BUDGET = {1: Budget(seconds=0.8, min_rounds=5, max_seconds=10), 8: Budget(seconds=0.8, min_rounds=2, max_seconds=15)}


@dataclass
class Figures:
    """What the demo found about one way of running one model. Times in seconds, memory in bytes."""

    way: str
    latency: float | None = None
    batch_time: float | None = None
    speed_up: float | None = None
    peak: int | None = None
    difference: float | None = None
    top1: int | None = None
    problem: str | None = None


@dataclass
class Result:
    """One model's figures, the number of photographs, and how many calls of each op each backend ran."""

    model: str
    images: int
    random_weights: bool
    figures: list[Figures] = field(default_factory=list)
    kernels: dict[str, list[tuple[str, str, int]]] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether every way gave the stock model's answers."""
        return not any(f.problem for f in self.figures)


Tick = Callable[[str, float], None]


MODELS = ("mobilenet_v2", "xception")


class Demo:
    """One model on the photographs."""

    def __init__(self, name: str, images: Tensor, weights: str | None, quick: bool):
        self.name, self.images, self.quick = name, images, quick
        model = stock.seeded(name)
        if weights:
            self.model = stock.load_weights(model, weights).eval()
        else:
            # Two passes over the photographs themselves: without them random weights answer the same to all.
            self.model = stock.calibrate(model, [images, images.flip(3)])
        self.result = Result(name, len(images), not weights)
        self.entries: dict[str, Entry] = {}

    def entry(self, way: Way) -> Entry:
        """How a way runs; built once."""
        if way.name not in self.entries:
            if way.ours:
                entry = peers.optimized(self.name, lambda: self.model, way.dtype, "cpu")
            else:
                entry = peers.eager(lambda: self.model, way.dtype, way.layout, "cpu")
            self.entries[way.name] = entry
        return self.entries[way.name]

    def run(self, tick: Tick) -> Result:
        """Everything about this model; `tick` hears what is being done and the share of it that is done."""
        tick("the stock model in float64", 0.0)
        with torch.no_grad():
            truth = peers.placed(self.model, "nchw", "cpu").double()(self.images.double())
        self.result.figures = [Figures(way.name) for way in WAYS]
        for attribute, batch, share in (("latency", 1, 0.1), ("batch_time", len(self.images), 0.5)):
            self._time(attribute, batch, truth, lambda done, share=share: tick("timing", share + 0.4 * done))
        tick("memory and answers", 0.9)
        outputs = {}
        for way, figures in zip(WAYS, self.result.figures):
            if figures.problem is None:
                outputs[way.name] = self._inspect(way, figures, truth)
        self._judge(outputs, truth)
        self._speed_ups()
        tick("which kernel ran where", 0.95)
        for way in WAYS:
            if way.ours:
                self.result.kernels[way.name] = self._kernels(way)
        tick("done", 1.0)
        return self.result

    def _time(self, attribute: str, batch: int, truth: Tensor, tick: Callable[[float], None]) -> None:
        """Races all ways on batches of this size and keeps the medians; who is wrong is not timed."""
        case = self._case(batch, truth)
        budget = Budget.quick() if self.quick else BUDGET[1 if batch == 1 else 8]
        result = Race(case).run(budget, tick)
        for figures in self.result.figures:
            row = result.rows[figures.way]
            figures.problem = figures.problem or row["refused"]
            setattr(figures, attribute, row.get("median"))

    def _case(self, batch: int, truth: Tensor) -> Case:
        position = 0

        def inputs(_: torch.Generator) -> tuple[Tensor, ...]:
            """The photographs in turn, the first ones first: they are compared with the truth."""
            nonlocal position
            indices = [(position + i) % len(self.images) for i in range(batch)]
            position += batch
            return (self.images[indices],)

        competitors = tuple(
            Competitor(way.name, way.dtype, lambda way=way: self.entry(way), way.layout, FP32) for way in WAYS
        )
        work = Work(2.0 * stock.MODELS[self.name].macs * batch, 0.0, FP32)
        return Case(
            f"{self.name} batch {batch}", work, inputs, lambda _: (truth[:batch],), competitors,
            yardsticks=YARDSTICKS,
        )  # fmt: skip

    def _inspect(self, way: Way, figures: Figures, truth: Tensor) -> Tensor:
        """Peak memory and answers on all photographs; the answers."""
        layout = torch.channels_last if way.layout == "nhwc" else torch.contiguous_format
        images, run = self.images.contiguous(memory_format=layout), self.entry(way).run
        outputs: list[Tensor] = []
        figures.peak = memory.peak_bytes(lambda: outputs.append(run(images)))
        output = outputs[0]
        figures.difference = relative_errors([output], [truth])[0]
        figures.top1 = int((output.argmax(1) == truth.argmax(1)).sum())
        return output

    def _judge(self, outputs: dict[str, Tensor], truth: Tensor) -> None:
        """A way must name the same class wherever stock torch in that precision leaves no doubt about it."""
        top = truth.topk(2, dim=1).values
        margin = top[:, 0] - top[:, 1]
        for way, figures in zip(WAYS, self.result.figures):
            yardstick = outputs.get(YARDSTICKS[way.dtype])
            if figures.problem or yardstick is None:
                continue
            doubt = 2 * (yardstick.double() - truth).abs().amax(1)
            differs = outputs[way.name].argmax(1) != truth.argmax(1)
            if (differs & (margin > 2 * doubt)).any():
                figures.problem = "wrong: names another class than the stock model"

    def _speed_ups(self) -> None:
        """Against the fastest eager way in the same precision, per image of the whole batch."""
        for dtype in (FP32, BF16):
            pairs = [(w, f) for w, f in zip(WAYS, self.result.figures) if w.dtype == dtype and f.batch_time]
            eager = min((f.batch_time for w, f in pairs if not w.ours), default=None)
            for _, figures in pairs:
                figures.speed_up = eager / figures.batch_time if eager else None

    def _kernels(self, way: Way) -> list[tuple[str, str, int]]:
        from fastcnn import optimize

        model = optimize(peers.fastcnn_model(self.name, lambda: self.model), dtype=way.dtype)
        counts = explain(model, self.images[:1].contiguous(memory_format=torch.channels_last)).kernels()
        return [(op, backend, calls) for (op, backend), calls in counts.items()]


def _cell(value: float | None, text: str) -> str:
    return "–" if value is None else text.format(value)


def result_table(result: Result) -> Table:
    """A model's figures."""
    weights = "random weights" if result.random_weights else "given weights"
    title = f"{result.model}, {result.images} photographs, {weights}"
    table = Table(title=title, title_justify="left", caption=LEGEND, caption_justify="left")
    table.add_column("way")
    for name in ("latency ms", "images/s", "speed-up", "peak MB", "difference", "same class", "answer"):
        table.add_column(name, justify="right")
    for f in result.figures:
        rate = result.images / f.batch_time if f.batch_time else None
        table.add_row(
            f.way,
            _cell(f.latency and 1e3 * f.latency, "{:.2f}"),
            _cell(rate, "{:.1f}"),
            _cell(f.speed_up, "{:.2f}×"),
            _cell(None if f.peak is None else f.peak / 1e6, "{:.1f}"),
            _cell(f.difference, "{:.1e}"),
            _cell(f.top1, "{}/" + str(result.images)),
            f.problem or "agrees",
        )
    return table


def kernel_table(results: Sequence[Result]) -> Table:
    """Which kernel ran where, in the inference form that fastcnn.optimize gives."""
    title = "which kernel ran where (fastcnn explain MODEL tells it layer by layer)"
    table = Table(title=title, title_justify="left")
    for name in ("model", "way", "op", "backend"):
        table.add_column(name)
    table.add_column("calls", justify="right")
    for result in results:
        for way, rows in result.kernels.items():
            for op, backend, calls in rows:
                table.add_row(result.model, way, op, backend, str(calls))
    return table


def plot(results: Sequence[Result], path: Path) -> None:
    """Images per second of each way, a panel per model."""
    stock.require("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 3), squeeze=False, layout="constrained")
    for ax, result in zip(axes[0], results):
        rates = [result.images / f.batch_time if f.batch_time else 0.0 for f in result.figures]
        colours = ["#2a7f62" if way.ours else "#9a9a9a" for way in WAYS]
        bars = ax.barh([way.name for way in WAYS], rates, color=colours)
        ax.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.set_title(f"{result.model}, batch {result.images}", fontsize=10, loc="left")
        ax.set_xlabel("images per second")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _weights(arguments: Sequence[str]) -> dict[str, str]:
    found = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not separator or name not in MODELS:
            raise ValueError(f"--weights: got {argument!r}, expected NAME=PATH with NAME of {', '.join(MODELS)}")
        if not Path(path).is_file():
            raise ValueError(f"--weights: no file {path!r}")
        found[name] = path
    return found


def run(args: argparse.Namespace, console: Console) -> list[Result]:
    """Runs the demo with a progress bar."""
    names = [args.model] if args.model else list(MODELS)
    weights = _weights(args.weights)
    for package in (*(stock.MODELS[n].package for n in names), "matplotlib"):
        stock.require(package)
    paths = args.images or photographs.sample_paths()
    paths = paths[:2] if args.quick else paths
    batches = {name: photographs.batch(paths, name, stock.MODELS[name].size) for name in names}
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads: got {args.threads}, expected 1 or more")
        torch.set_num_threads(args.threads)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names))
        for i, name in enumerate(names):

            def tick(what: str, done: float, i: int = i, name: str = name) -> None:
                progress.update(task, description=f"{name}: {what}", completed=i + done)

            tick("weights and statistics", 0.0)
            results.append(Demo(name, batches[name], weights.get(name), args.quick).run(tick))
    return results


def main(args: argparse.Namespace, console: Console) -> int:
    """``fastcnn demo``: 1 if an answer differs from the stock model's."""
    results = run(args, console)
    for result in results:
        console.print(result_table(result))
    console.print(kernel_table(results))
    path = Path(args.output) / "demo.png"
    plot(results, path)
    console.print(f"plot: {path}", highlight=False, markup=False)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    return 0 if all(r.agrees for r in results) else 1
