"""The matrix-product core through the pointwise convolution: fastcnn, torch linear, torch mm."""

from __future__ import annotations

import pytest

from bench import harness
from fastcnn.benchmark.case import Case
from fastcnn.benchmark.suites import pointwise as suite


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    harness.parametrize(metafunc, suite)


def bench_pointwise_conv2d(benchmark, case: Case, pytestconfig: pytest.Config) -> None:
    harness.run(benchmark, case, suite, pytestconfig)
