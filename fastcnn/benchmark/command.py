"""``fastcnn bench``: chooses, runs, prints and keeps benchmarks."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

import fastcnn.ops  # noqa: F401  (registers the primitives)
from fastcnn.benchmark import peaks, report, suites
from fastcnn.benchmark.case import OURS, Budget
from fastcnn.benchmark.race import RaceResult

# `make gpu` has five minutes for this; the last case to start takes its own time.
GPU_MINUTES = 3.5


def _options(args: argparse.Namespace) -> suites.Options:
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads: got {args.threads}, expected 1 or more")
        torch.set_num_threads(args.threads)
    if args.gpu:
        if not torch.cuda.is_available():
            raise RuntimeError("--gpu: torch sees no CUDA device")
        torch.backends.cudnn.benchmark = True
        # float32 means float32: TF32 would fail the check.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    minutes = args.minutes if args.minutes is not None else GPU_MINUTES if args.gpu else None
    return suites.Options(
        device="cuda" if args.gpu else "cpu",
        dtypes=(torch.bfloat16,) if args.gpu else (torch.float32, torch.bfloat16),
        quick=args.quick,
        only=args.only,
        budget=_budget(args),
        deadline=None if minutes is None else time.monotonic() + 60 * minutes,
    )


def _budget(args: argparse.Namespace) -> Budget:
    if args.quick:
        return Budget.quick()
    if args.seconds is not None:
        return Budget(seconds=args.seconds)
    return Budget(seconds=0.05) if args.gpu else Budget()


def _line(result: RaceResult) -> str:
    """A finished case on one line."""
    times = [f"{n} {1e3 * r['median']:.3g} ms" for n, r in result.rows.items() if r.get("median")]
    ratio = result.ratio_to_best()
    return f"{', '.join(times)}{f'; × {ratio:.2f}' if ratio else ''}"


def main(args: argparse.Namespace, console: Console) -> int:
    """Runs; 1 if one of our own results was wrong or did not run, else 0."""
    options = _options(args)
    if next(suites.selected_cases(options), None) is None:
        raise ValueError(f"--only: got {args.only!r}, expected a part of {', '.join(suites.names())}/<case>")
    if args.list:
        for suite, case in suites.selected_cases(options):
            console.print(f"{suite.NAME}/{case.name}", highlight=False, markup=False)
        return 0
    with console.status("measuring what the machine can do") as status:
        for dtype in options.dtypes:
            rate = peaks.matrix_peak(dtype, options.device)
            console.print(f"matrix peak, {str(dtype).removeprefix('torch.')}: {rate / 1e9:.0f} Gop/s")
        console.print(f"copy bandwidth: {peaks.copy_bandwidth(options.device) / 1e9:.1f} GB/s")

        def progress(label: str, result: RaceResult | None) -> None:
            status.update(escape(label))
            if result is not None:
                console.print(f"{label}: {_line(result)}", highlight=False, markup=False)

        results = suites.run(options, progress)
    wrong = _print(results, console)
    directory = Path(args.output) if args.output else report.default_directory()
    where = report.save(results, options.device, directory, options.quick, partial=suites.is_partial(results, options))
    if args.json:
        data = [report.record(result, options.device, options.quick) for result in results]
        Path(args.json).write_text(json.dumps(data, indent=1, default=str) + "\n")
    console.print(f"kept in {where}", highlight=False, markup=False)
    return 1 if wrong else 0


def _print(results: list, console: Console) -> bool:
    """Prints tables, notes and refusals; whether one of our own competitors was wrong or failed."""
    wrong = False
    for result in results:
        for table in report.suite_tables(result):
            console.print(table)
        for note in result.notes:
            console.print(f"  {note}", highlight=False, markup=False)
        for refusal in report.refusals(result.races):
            console.print(f"  refused: {refusal}", highlight=False, markup=False, style="yellow")
        wrong |= any(
            (row["refused"] or "").startswith(("wrong", "failed"))
            for race in result.races
            for name, row in race.rows.items()
            if name.startswith(OURS)
        )
    return wrong
