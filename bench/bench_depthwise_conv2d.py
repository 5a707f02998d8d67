"""The depthwise layers of MobileNet-v2 and Xception, forward and backward: fastcnn, torch NCHW and NHWC."""

from __future__ import annotations

import pytest

from bench import harness
from fastcnn.benchmark.case import Case
from fastcnn.benchmark.suites import depthwise as suite


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    harness.parametrize(metafunc, suite)


def bench_depthwise_conv2d(benchmark, case: Case, pytestconfig: pytest.Config) -> None:
    harness.run(benchmark, case, suite, pytestconfig)
