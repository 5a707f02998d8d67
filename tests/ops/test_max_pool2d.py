"""Maximum pooling against torch's: exact, since it only chooses among its inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcnn.nn import MaxPool2d
from fastcnn.ops import max_pool2d

SHAPES = [(1, 1, 3, 3), (2, 7, 9, 6), (1, 33, 12, 17), (3, 64, 5, 5), (0, 4, 6, 6)]
WINDOWS = [
    ((3, 3), (2, 2), (1, 1), False),
    ((2, 2), (2, 2), (0, 0), False),
    ((3, 2), (1, 2), (1, 0), False),
    ((3, 3), (2, 2), (0, 0), True),
    ((2, 3), (3, 2), (1, 1), True),
]


def torchs(x: Tensor, kernel: tuple, stride: tuple, padding: tuple, ceil_mode: bool) -> Tensor:
    return F.max_pool2d(x, kernel, stride, padding, 1, ceil_mode)


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_torch(dtype: torch.dtype, shape: tuple[int, ...], window: tuple) -> None:
    x = torch.randn(shape, dtype=dtype)
    for of in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(max_pool2d(of, *window), torchs(x, *window), rtol=0, atol=0)


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_nan_and_infinities(dtype: torch.dtype) -> None:
    x = torch.randn(1, 20, 6, 6, dtype=dtype)
    nan = torch.tensor(float("nan"), dtype=dtype)
    x[0, 3, 2, 2], x[0, 4, 0, 0], x[0, 5] = nan, float("inf"), float("-inf")
    x[0, 6, 1, 4] = -nan  # of the other sign
    x[0, 7], x[0, 8] = -0.0, torch.randn(6, 6) * 1e-40
    got, want = max_pool2d(x, *WINDOWS[0]), torchs(x, *WINDOWS[0])
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def gradient_check(x: Tensor, window: tuple) -> None:
    """Where a window holds the largest of few different values more than once, the first wins, as in torch."""
    x.requires_grad_()
    y, want = max_pool2d(x, *window), torchs(x, *window)
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    grad = torch.randint(-8, 9, y.shape).to(x.dtype)  # sums of these are exact
    got, expected = torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(want, x, grad)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def few_values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Halves from -1.5 to 1.5, zeros of both signs among them."""
    signs = torch.randint(0, 2, shape) * 2.0 - 1
    return (torch.randint(-3, 4, shape) / 2 * signs).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("window", [*WINDOWS, ((5, 5), (1, 2), (2, 1), False), ((2, 2), (3, 3), (0, 0), False)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_is_torchs(dtype: torch.dtype, shape: tuple[int, ...], window: tuple) -> None:
    if min(shape[2] + 2 * window[2][0] - window[0][0], shape[3] + 2 * window[2][1] - window[0][1]) < 0:
        pytest.skip("the window is larger than the image")
    gradient_check(few_values(shape, dtype), window)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    draw = lambda lo, hi: data.draw(st.integers(lo, hi))  # noqa: E731
    kernel, stride = (draw(1, 5), draw(1, 5)), (draw(1, 4), draw(1, 4))
    padding = draw(0, kernel[0] // 2), draw(0, kernel[1] // 2)
    size = [draw(max(1, k - 2 * p), 12) for k, p in zip(kernel, padding, strict=True)]
    x = few_values((draw(1, 2), draw(1, 70), *size), data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    gradient_check(x, (kernel, stride, padding, data.draw(st.booleans())))


def test_keeps_one_byte_per_output() -> None:
    x = torch.randn(2, 64, 56, 56).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = max_pool2d(x, (3, 3), (2, 2), (1, 1))
    assert sum(t.numel() * t.element_size() for t in y.grad_fn.saved_tensors) == y.numel()


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_opcheck(ceil_mode: bool) -> None:
    x = torch.randn(2, 5, 8, 6)
    window = ((3, 3), (2, 2), (0, 1), ceil_mode)
    for indexed in (False, True):
        torch.library.opcheck(torch.ops.fastcnn.max_pool2d_fwd.default, (x, *window, indexed))
    y, index = torch.ops.fastcnn.max_pool2d_fwd(x, *window, True)
    torch.library.opcheck(torch.ops.fastcnn.max_pool2d_bwd.default, (y, index, (8, 6), *window[:3]))


@pytest.mark.parametrize(
    ("shape", "window", "message"),
    [
        (
            (1, 2, 4, 4),
            ((2, 2), (2, 2), (2, 0), False),
            r"padding: got \(2, 0\), expected at most half of the window \(2, 2\)",
        ),
        (
            (1, 2, 1, 4),
            ((3, 3), (2, 2), (0, 0), True),
            r"x: got shape \[1, 2, 1, 4\], expected room for a window \(3, 3\)",
        ),
        ((1, 2, 4, 2), ((3, 3), (1, 1), (0, 0), False), r"x: got shape \[1, 2, 4, 2\], expected room for a window"),
    ],
)
def test_bad_input(shape: tuple[int, ...], window: tuple, message: str) -> None:
    for grad in (False, True):
        with pytest.raises(ValueError, match=message):
            max_pool2d(torch.randn(shape, requires_grad=grad), *window)


def test_symbolic_sizes() -> None:
    layer = MaxPool2d(3, 2, ceil_mode=True)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=True, fullgraph=True)
    for size in (15, 16, 18):
        x = torch.randn(2, 3, size, size + 3)
        assert torch.equal(compiled(x), layer(x))


def test_large_windows_are_torchs() -> None:
    x = torch.randn(1, 3, 20, 20, requires_grad=True)
    assert torch.equal(max_pool2d(x, (17, 17), (1, 1), (0, 0)), F.max_pool2d(x, 17, 1))


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_into_and_from_a_slice(dtype: torch.dtype, indexed: bool) -> None:
    x = torch.randn(2, 16, 9, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)[:, 4:11]
    y, index = torch.ops.fastcnn.max_pool2d_fwd(x.contiguous(), *WINDOWS[0], indexed)
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


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_layer_is_torchs(ceil_mode: bool) -> None:
    x = torch.randn(2, 6, 11, 8)
    layer = MaxPool2d(3, 2, ceil_mode=ceil_mode)
    assert layer.is_fused(x)
    y = layer(x)
    assert torch.equal(y, torch.nn.MaxPool2d(3, 2, ceil_mode=ceil_mode)(x))
    assert y.shape == layer.output_shape(x.shape)
