"""What a run leaves: tables on the terminal, JSON and plots, one Markdown summary per machine."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import torch
from rich.table import Table

import fastcnn
from fastcnn.benchmark import machine, peaks
from fastcnn.benchmark.race import RaceResult
from fastcnn.benchmark.targets import Curve, SuiteResult, Target


def default_directory() -> Path:
    """bench/ of the checkout that runs, else ./fastcnn-bench."""
    bench = Path(fastcnn.__file__).resolve().parents[1] / "bench"
    return bench if bench.is_dir() else Path("fastcnn-bench")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    ms = seconds * 1e3
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def columns(races: list[RaceResult]) -> list[str]:
    """Every competitor of a suite, ours first."""
    return list(dict.fromkeys(name for race in races for name in race.rows))


def race_cells(race: RaceResult, names: list[str]) -> list[str]:
    """A race as a row: what, median ms of each, ratio to the best peer, share of the floor, and the rate."""
    cells = [f"{race.name}{f' ({race.count}×)' if race.count > 1 else ''}"]
    for name in names:
        row = race.rows.get(name)
        if row is None:
            cells.append("")
        else:
            cells.append("refused" if row["refused"] else _time(row.get("median")))
    fraction = race.fraction_of_floor()
    cells += [_ratio(race.ratio_to_best()), "–" if fraction is None else f"{100 * fraction:.0f} %"]
    if race.tags.get("rate"):
        ours = race.ours()
        cells.append("–" if ours is None else f"{race.operations / ours / 1e9:.0f}")
    return cells


def header(races: list[RaceResult]) -> list[str]:
    """The columns' titles for race_cells."""
    rate = ["Gop/s"] if races and races[0].tags.get("rate") else []
    return ["ms", *columns(races), "× best peer", "of floor", *rate]


def refusals(races: list[RaceResult]) -> list[str]:
    """Who was refused, where and why; the same reason once."""
    found: dict[str, list[str]] = {}
    for race in races:
        for name, row in race.rows.items():
            if row["refused"]:
                found.setdefault(f"{name}: {row['refused']}", []).append(race.name)
    return [f"{what} ({where[0]}{f' and {len(where) - 1} more' if where[1:] else ''})" for what, where in found.items()]


def target_cells(target: Target) -> list[str]:
    """A target as a row."""
    sign = "≤" if target.less_is_better else "≥"
    reached = {None: "not measured", True: "yes", False: "no"}[target.reached]
    return [target.work, target.against, f"{sign} {target.bound:g}", _ratio(target.measured), reached]


TARGET_HEADER = ["work", "against", "to reach", "measured", "reached"]


def _table(title: str, names: list[str], rows: list[list[str]], left: int = 1) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def suite_tables(suite: SuiteResult) -> list[Table]:
    """A suite on the terminal: races, then targets."""
    tables = []
    if suite.races:
        names = columns(suite.races)
        tables.append(_table(suite.title, header(suite.races), [race_cells(r, names) for r in suite.races]))
    if suite.targets:
        rows = [target_cells(t) for t in suite.targets]
        tables.append(_table(f"{suite.title}: targets", TARGET_HEADER, rows, left=2))
    return tables


def _markdown(names: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def record(suite: SuiteResult, device: str, quick: bool) -> dict:
    """A suite's result with all that it depends on, ready for JSON."""
    dtypes = (torch.float32, torch.bfloat16)
    facts = machine.describe(device)
    return {
        "machine": facts,
        "peaks": peaks.summary(dtypes, device),
        "quick": quick,
        "suite": suite.as_dict(),
    }


def save(results: list[SuiteResult], device: str, directory: Path, quick: bool = False, partial: bool = False) -> Path:
    """Writes a JSON file and plots per suite, and from the latest whole suites the machine's summary.

    Layout: raw/<machine>/<suite>.json, .png and -<curve>.png, results/<machine>.md and -<suite>-<curve>.png. Quick or
    partial runs go to raw/<machine>/partial/ and leave the summary as it is.
    """
    records = [record(result, device, quick) for result in results]
    name = machine.slug(machine.describe(device))
    raw = directory / "raw" / name
    target = raw / "partial" if quick or partial else raw
    target.mkdir(parents=True, exist_ok=True)
    for data in records:
        path = target / f"{data['suite']['name']}.json"
        path.write_text(json.dumps(data, indent=1, default=str) + "\n")
        suite = SuiteResult.from_dict(data["suite"])
        plot(suite, path.with_suffix(".png"))
        plot_curves(suite, path.with_suffix(""))
    if quick or partial:
        return target
    return write_summary(raw, directory / "results" / f"{name}.md")


def write_summary(raw: Path, path: Path) -> Path:
    """Renders a machine's summary, and its curves beside it, from the suites' latest records."""
    from fastcnn.benchmark import suites

    order = {suite.NAME: i for i, suite in enumerate(suites.SUITES)}
    records = [json.loads(p.read_text()) for p in raw.glob("*.json")]
    records.sort(key=lambda r: order.get(r["suite"]["name"], len(order)))
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for data in records:
        suite = SuiteResult.from_dict(data["suite"])
        pictures[suite.name] = plot_curves(suite, path.with_name(f"{path.stem}-{suite.name}"))
    path.write_text("\n".join(summary_lines(records, pictures)) + "\n")
    return path


def _versions(facts: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return f"{versions}; CPU kernels: {facts['cpu_kernels']}"


def summary_lines(records: list[dict], pictures: dict[str, dict[str, Path]]) -> list[str]:
    """The Markdown summary: the machine, then each suite's targets and pictures (by title), and whole models in full."""
    facts, rates = records[0]["machine"], records[0]["peaks"]
    peak = ", ".join(f"{name} {rate / 1e9:.0f} Gop/s" for name, rate in rates["matrix_ops_per_s"].items())
    lines = [
        f"# {facts.get('gpu', facts['cpu'])}",
        "",
        "Written by `fastcnn bench`; do not edit.",
        "",
        f"{facts['cores']} cores, {facts['threads']} threads, {', '.join(facts['features'])}.",
        f"{_versions(facts)}.",
        f"Measured peaks: {peak}, copies {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s.",
    ]
    for data in records:
        suite, facts = SuiteResult.from_dict(data["suite"]), data["machine"]
        lines += ["", f"## {suite.title}", "", f"Commit {facts['commit']}, {facts['date'][:10]}.", ""]
        lines += _markdown(TARGET_HEADER, [target_cells(t) for t in suite.targets])
        if suite.name in ("models", "pointwise"):
            names = columns(suite.races)
            lines += ["", *_markdown(header(suite.races), [race_cells(r, names) for r in suite.races])]
        for title, picture in pictures[suite.name].items():
            lines += ["", f"![{title}]({picture.name})"]
        notes = [*suite.notes, *(f"Refused: {r}." for r in refusals(suite.races))]
        lines += ["", *(f"- {note}" for note in notes)]
    return lines


def _pyplot() -> ModuleType | None:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(suite: SuiteResult, path: Path) -> Path | None:
    """A bar per race: the ratio to the best peer. None without matplotlib or where nothing has a ratio."""
    pairs = [(race.name, race.ratio_to_best()) for race in suite.races]
    pairs = [(name, ratio) for name, ratio in pairs if ratio]
    plt = _pyplot()
    if plt is None or not pairs:
        return None
    names, ratios = zip(*pairs)
    figure, ax = plt.subplots(figsize=(8, 1.2 + 0.16 * len(pairs)), layout="constrained")
    bars = ax.barh(names, ratios, color=["#2a7f62" if ratio >= 1 else "#b5483a" for ratio in ratios])
    ax.bar_label(bars, fmt="%.2f", padding=2, fontsize=6)
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_ylim(len(pairs) - 0.4, -0.6)
    ax.tick_params(axis="y", labelsize=6)
    ax.set_title(suite.title, fontsize=9, loc="left")
    ax.set_xlabel("times as fast as the best peer", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def plot_curves(suite: SuiteResult, stem: Path) -> dict[str, Path]:
    """A picture <stem>-<curve>.png per curve, by title; none without matplotlib or where nothing was measured."""
    plt, drawn = _pyplot(), {}
    for curve in suite.curves if plt else ():
        if any(value is not None for values in curve.series.values() for value in values):
            path = stem.with_name(f"{stem.name}-{curve.name}.png")
            _plot_curve(plt, curve, path)
            drawn[curve.title] = path
    return drawn


def _plot_curve(plt: ModuleType, curve: Curve, path: Path) -> None:
    """On logarithmic axes, where what grows linearly is parallel to the dotted line from the first series' first point."""
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    measured = {
        name: [(x, y) for x, y in zip(curve.x, values, strict=True) if y is not None]
        for name, values in curve.series.items()
    }
    measured = {name: points for name, points in measured.items() if points}
    for name, points in measured.items():
        ax.plot(*zip(*points), marker="o", markersize=3, label=name)
        ax.annotate(f"{points[-1][1]:.0f}", points[-1], (4, -2), textcoords="offset points", fontsize=7)
    x0, y0 = next(iter(measured.values()))[0]
    ax.plot(curve.x, [y0 * x / x0 for x in curve.x], ":", color="gray", linewidth=1, label="linear")
    ax.margins(x=0.08)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(curve.x, [f"{x:g}" for x in curve.x])
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    ax.set_title(curve.title, fontsize=9, loc="left")
    ax.set_xlabel(curve.x_label, fontsize=8)
    ax.set_ylabel(curve.y_label, fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)
