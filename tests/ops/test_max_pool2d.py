"""Maximum pooling against torch's: exact, since it only chooses among its inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastcnn import native
from fastcnn.ops import max_pool2d

SHAPES = [(1, 1, 3, 3), (2, 7, 9, 6), (1, 33, 12, 17), (3, 64, 5, 5), (0, 4, 6, 6)]
WINDOWS = [((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 2), (1, 0))]


@pytest.mark.parametrize("isa", native.module().isa_available() if native.module() else [None])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_torch(isa: str | None, dtype: torch.dtype, shape: tuple[int, ...], window: tuple) -> None:
    active = native.module().isa_active() if isa else None
    x = torch.randn(shape, dtype=dtype)
    try:
        if isa:
            native.module().set_isa(isa)
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(max_pool2d(given, *window), F.max_pool2d(x, *window), rtol=0, atol=0)
    finally:
        if isa:
            native.module().set_isa(active)


def test_keeps_nan_and_infinities() -> None:
    x = torch.randn(1, 20, 6, 6)
    x[0, 3, 2, 2], x[0, 4, 0, 0], x[0, 5] = float("nan"), float("inf"), float("-inf")
    got, want = max_pool2d(x, (3, 3), (2, 2), (1, 1)), F.max_pool2d(x, 3, 2, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_gradient_is_torchs() -> None:
    x = torch.randn(2, 5, 7, 7, requires_grad=True)
    grad = torch.autograd.grad(max_pool2d(x, (3, 3), (2, 2), (1, 1)).square().sum(), x)[0]
    want = torch.autograd.grad(F.max_pool2d(x, 3, 2, 1).square().sum(), x)[0]
    torch.testing.assert_close(grad, want)
