"""pytest bench/ collects the cases, races them, and prints the tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _bench(*argv: str) -> str:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--quick", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.slow
def test_case_runs_and_is_reported() -> None:
    out = _bench("bench", "-k", "pointwise and 392 and fp32")
    assert "1 passed" in out
    assert "torch linear" in out
    assert "kept in" in out
