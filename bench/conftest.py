"""pytest bench/: collects bench_*.py, and prints and keeps the results as `fastcnn bench` does."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

import fastcnn.ops  # noqa: F401  (registers the primitives)
from bench import harness
from fastcnn.benchmark import report, suites


def pytest_configure(config: pytest.Config) -> None:
    """Benchmarks are called bench_* here; `pytest` alone does not run them."""
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that `fastcnn bench` has too."""
    parser.addoption("--quick", action="store_true", help="few cases and rounds, no torch.compile: a smoke test")
    parser.addoption("--gpu", action="store_true", help="on the GPU, against cuDNN and max-autotune")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Tables with the targets, and the files that `fastcnn bench` would write."""
    if not harness.RESULTS:
        return
    options, console = harness.options(config), Console(width=160)
    results = [
        suites.finish(suite, harness.RESULTS[suite.NAME], options)
        for suite in suites.SUITES
        if suite.NAME in harness.RESULTS
    ]
    for result in results:
        for table in report.suite_tables(result):
            console.print(table)
        for refusal in report.refusals(result.races):
            terminalreporter.write_line(f"refused: {refusal}")
    partial = bool(config.getoption("keyword")) or suites.is_partial(results, options)
    where = report.save(results, options.device, Path(__file__).parent, options.quick, partial)
    terminalreporter.write_line(f"kept in {where}")
