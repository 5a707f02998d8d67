"""The 3x3 layers of ResNet-50 and ResNeXt-50, forward and backward: fastcnn, torch NCHW and NHWC."""

from __future__ import annotations

import pytest

from bench import harness
from fastcnn.benchmark.case import Case
from fastcnn.benchmark.suites import conv2d as suite


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    harness.parametrize(metafunc, suite)


def bench_conv2d(benchmark, case: Case, pytestconfig: pytest.Config) -> None:
    harness.run(benchmark, case, suite, pytestconfig)
