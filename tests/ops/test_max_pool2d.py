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


@pytest.mark.parametrize("isa", native.module().isa_available() if native.module() else [None])
@pytest.mark.parametrize("window", [*WINDOWS, ((5, 5), (1, 2), (2, 1)), ((2, 2), (3, 3), (0, 0))])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_is_torchs(isa: str | None, dtype: torch.dtype, shape: tuple[int, ...], window: tuple) -> None:
    active = native.module().isa_active() if isa else None
    if min(shape[2] + 2 * window[2][0] - window[0][0], shape[3] + 2 * window[2][1] - window[0][1]) < 0:
        pytest.skip("the window is larger than the image")
    # Few different values: where a window holds the largest more than once, the first wins, as in torch.
    x = (torch.randint(-3, 4, shape) / 2).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    try:
        if isa:
            native.module().set_isa(isa)
        y, want = max_pool2d(x, *window), F.max_pool2d(x, *window)
        grad = torch.randint(-8, 9, y.shape).to(dtype)  # sums of these are exact
        got, expected = torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(want, x, grad)[0]
    finally:
        if isa:
            native.module().set_isa(active)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_keeps_one_byte_per_output() -> None:
    x = torch.randn(2, 64, 56, 56).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = max_pool2d(x, (3, 3), (2, 2), (1, 1))
    assert sum(t.numel() * t.element_size() for t in y.grad_fn.saved_tensors) == y.numel()


def test_opcheck() -> None:
    x = torch.randn(2, 5, 7, 6)
    window = ((3, 3), (2, 2), (1, 1))
    for indexed in (False, True):
        torch.library.opcheck(torch.ops.fastcnn.max_pool2d_fwd.default, (x, *window, indexed))
    y, index = torch.ops.fastcnn.max_pool2d_fwd(x, *window, True)
    torch.library.opcheck(torch.ops.fastcnn.max_pool2d_bwd.default, (y, index, (7, 6), *window))


def test_large_windows_are_torchs() -> None:
    x = torch.randn(1, 3, 20, 20, requires_grad=True)
    assert torch.equal(max_pool2d(x, (17, 17), (1, 1), (0, 0)), F.max_pool2d(x, 17, 1))


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_into_a_slice(dtype: torch.dtype, indexed: bool) -> None:
    x = torch.randn(2, 7, 9, 6, dtype=dtype)
    y, index = torch.ops.fastcnn.max_pool2d_fwd(x, *WINDOWS[0], indexed)
    buffer = torch.full((2, 12, *y.shape[2:]), -1.0, dtype=dtype).contiguous(memory_format=torch.channels_last)
    args = (buffer[:, 3:10], x, *WINDOWS[0], indexed)
    torch.library.opcheck(
        torch.ops.fastcnn.max_pool2d_into.default, args, test_utils=("test_schema", "test_faketensor")
    )
    got = torch.ops.fastcnn.max_pool2d_into(*args)
    assert torch.equal(buffer[:, 3:10], y)
    assert torch.equal(got, index)
    assert (buffer[:, :3] == -1).all()
    assert (buffer[:, 10:] == -1).all()
