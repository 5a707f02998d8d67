"""The GPU clock captures a competitor and times it; the host's cost is apart."""

from __future__ import annotations

import pytest
import torch

from fastcnn.benchmark.case import Budget, Case, Competitor, Entry, Work
from fastcnn.benchmark.gpu import GpuClock
from fastcnn.benchmark.race import Race

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_race_on_a_gpu() -> None:
    dtype = torch.bfloat16
    case = Case(
        "double",
        Work(1e6, 4 << 20, dtype),
        lambda g: (torch.randn(1024, 1024, generator=g).to(dtype).float(),),
        lambda x: (2 * x,),
        (
            Competitor("fastcnn", dtype, lambda: Entry(lambda x: 2 * x)),
            Competitor("wrong", dtype, lambda: Entry(lambda x: 3 * x)),
            Competitor("uncapturable", dtype, lambda: Entry(lambda x: x * float(x[0, 0].isfinite() + 1))),
        ),
    )
    rows = Race(case, "cuda", GpuClock()).run(Budget(0.0, 3, 3)).rows
    assert 0 < rows["fastcnn"]["median"] < 1e-3
    assert rows["fastcnn"]["host"] > 0
    assert rows["wrong"]["refused"].startswith("wrong")
    assert rows["uncapturable"]["graph"].startswith("not captured")
