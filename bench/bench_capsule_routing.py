"""Capsule votes and routing: fastcnn, torch eager and compiled."""

from __future__ import annotations

import pytest

from bench import harness
from fastcnn.benchmark.case import Case
from fastcnn.benchmark.suites import capsules as suite


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    harness.parametrize(metafunc, suite)


def bench_capsules(benchmark, case: Case, pytestconfig: pytest.Config) -> None:
    harness.run(benchmark, case, suite, pytestconfig)
