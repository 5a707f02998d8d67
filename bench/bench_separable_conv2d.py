"""The separable layers of both models, inference and training form: fastcnn, torch NCHW and NHWC."""

from __future__ import annotations

import pytest

from bench import harness
from fastcnn.benchmark.case import Case
from fastcnn.benchmark.suites import separable as suite


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    harness.parametrize(metafunc, suite)


def bench_separable_conv2d(benchmark, case: Case, pytestconfig: pytest.Config) -> None:
    harness.run(benchmark, case, suite, pytestconfig)
