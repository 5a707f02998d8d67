"""The primitives that write to a slice of a buffer, and the dense block that they are for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcnn import backends
from fastcnn import triton as backend
from fastcnn.ops import BatchNorm, DenseLayer, dense_block
from tests.ops.cases import NONE, RELU, affine, as64, laid_out, on_grid, weight
from tests.ops.test_dense_block import copied, layers, plain, run
from tests.tolerances import TOLERANCE, assert_close, relative_error
from tests.triton.compare import on

DTYPES = (torch.float32, torch.float16)
WHERE, STORE = ((1, 1), (1, 1), (1, 1), 1), (None, None, NONE, None)
# Those after the first two begin where a vector does not, and have channels around its width.
CHANNELS = (1, 7, 16, 33)


def into(primitive: str, out: Tensor, args: tuple, device: str) -> None:
    """Runs a primitive on a slice that holds ``out``, and compares the slice, what is around it, and its results."""
    n, c, h, w = out.shape
    buffer = torch.full((n, h, w, c + 9), 7.0, dtype=out.dtype, device=device).permute(0, 3, 1, 2)
    view = buffer[:, 4 : 4 + c]
    view.copy_(out)
    exact = out.double()
    expected = backends.REFERENCES[primitive](exact, *map(as64, args))
    actual = getattr(backend, primitive)(view, *on(device, args))
    assert_close(view.cpu(), exact, out.dtype, primitive)
    assert (buffer[:, :4] == 7).all()
    assert (buffer[:, 4 + c :] == 7).all()
    for i, (a, e) in enumerate(zip(actual or (), expected or (), strict=True)):
        assert a.dtype == torch.float32
        assert_close(a.cpu(), e, out.dtype, f"{primitive} result {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_slices(channels, dtype, device):
    x = laid_out(on_grid(2, 24, 6, 7, dtype=dtype), "slice")
    out = torch.full((2, channels, 6, 7), torch.nan, dtype=dtype)
    head, tail = (*affine(24), RELU), (*affine(channels), RELU, on_grid(2, channels, 6, 7, dtype=dtype))
    into("conv2d_into", out, (x, weight(channels, 24, 3, 3), *head, *tail, *WHERE, False), device)
    dropped = (x, weight(channels, 24, 3, 3), *head, *WHERE[:3], 0.4, 1 / 0.6, torch.tensor([channels, 5]))
    into("conv2d_dropout_into", out, (*dropped, False), device)
    into("pointwise_into", out, (x, weight(channels, 24, 1, 1), *head, *tail, (1, 1), False), device)
    into("affine_act_into", out, (on_grid(2, channels, 6, 7, dtype=dtype), *affine(channels), RELU, tail[3]), device)
    # Means of large values: those around zero have no digits of their own.
    bias = (None, torch.full((channels,), 4.0), NONE, None)
    into("conv2d_into", out, (x, weight(channels, 24, 3, 3), *head, *bias, *WHERE, True), device)
    into("pointwise_into", out[..., :3, :4], (x, weight(channels, 24, 1, 1), *head, *bias, (2, 2), True), device)


@pytest.mark.parametrize("groups", [4, 8])
def test_slices_of_grouped_convolutions(groups, device):
    x, out = on_grid(2, 24, 6, 7), torch.full((2, 16, 6, 7), torch.nan)
    args = (x, weight(16, 24 // groups, 3, 3), *affine(24), RELU, *STORE, *WHERE[:3], groups, False)
    into("conv2d_into", out, args, device)


@pytest.mark.parametrize("primitive", ["pointwise_into", "affine_act_into"])
def test_an_output_that_is_no_slice(primitive, device):
    x, out = (on_grid(2, 8, 4, 4).to(device) for _ in range(2))
    args = {"pointwise_into": (weight(8, 8, 1, 1).to(device), None, None, NONE, *STORE, (1, 1), False)}
    with pytest.raises(ValueError, match="out: got strides"):
        getattr(backend, primitive)(out.contiguous(), x, *args.get(primitive, STORE))


def gradient(channels: int, outputs: int, act: int, dtype: torch.dtype, size=(6, 7), scaled: bool = True) -> tuple:
    """dx and the other arguments of pointwise_bwd_into but for what is needed, x and y in slices."""
    x, y = (laid_out(on_grid(2, c, *size, dtype=dtype), "slice") for c in (channels, outputs))
    grad, out = on_grid(2, outputs, *size, dtype=dtype), on_grid(2, channels, *size, dtype=dtype)
    source = (x, *(affine(channels) if scaled else (None, None)), act, torch.randn(channels))
    # A rounded weight is off in the same direction at every pixel: in a sum that cancels that is more than rounding.
    return (
        out,
        grad,
        y,
        None,
        None,
        NONE,
        torch.randn(4, outputs),
        *source,
        weight(outputs, channels, 1, 1, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("need", [(True, True), (False, True), (False, False), (True, False)], ids=str)
@pytest.mark.parametrize(("channels", "outputs"), [(1, 4), (7, 48), (16, 16), (33, 20)])
def test_accumulated_gradient(channels, outputs, need, dtype, device):
    out, *args = gradient(channels, outputs, RELU, dtype)
    into("pointwise_bwd_into", out, (*args, *need), device)


@pytest.mark.parametrize("need", [(True, True), (False, False)], ids=str)
def test_accumulated_gradient_of_a_plain_input(need, device):
    out, *args = gradient(33, 20, NONE, torch.float32, scaled=False)
    into("pointwise_bwd_into", out, (*args, *need), device)


def test_accumulated_gradient_of_many_tiles(device):
    out, *args = gradient(130, 24, RELU, torch.float32, (30, 11))  # 11 x 3 tiles
    into("pointwise_bwd_into", out, (*args, True, True), device)


def test_no_images(device):
    out, *args = (a[:0] if isinstance(a, Tensor) and a.dim() == 4 and len(a) == 2 else a
                  for a in gradient(8, 16, RELU, torch.float32))  # fmt: skip
    into("pointwise_bwd_into", out, (*args, True, True), device)
    into("conv2d_into", out, (args[6], weight(8, 8, 3, 3), None, None, NONE, *STORE, *WHERE, False), device)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_widened(dtype, device):
    x = on_grid(2, 7, 5, 6, dtype=dtype)
    buffer = backend.widened(x.to(device), 20)
    assert buffer.shape == (2, 20, 5, 6)
    assert buffer.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(buffer[:, :7].cpu(), x)


def placed(block: list[DenseLayer], device: str) -> list[DenseLayer]:
    """A block's parameters on a device, as leaves of their own."""

    def move(t: Tensor) -> Tensor:
        return t.detach().to(device).requires_grad_(t.requires_grad)

    def norm(n: BatchNorm) -> BatchNorm:
        return n._replace(**{k: move(v) for k, v in n._asdict().items() if isinstance(v, Tensor)})

    return [DenseLayer(norm(n1), move(w1), norm(n2), move(w2)) for n1, w1, n2, w2 in block]


@pytest.mark.parametrize("memory", ["fast", "min"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "growth", "middle"), [((3, 16, 5, 6), 8, 16), ((2, 5, 4, 9), 3, 7)])
def test_dense_block(shape, growth, middle, training, memory, device):
    x, block = torch.randn(shape), layers(3, shape[1], growth, middle, training)
    grad = torch.randn(shape[0], shape[1] + 3 * growth, *shape[2:])
    exact = run(plain, x.double(), copied(block, torch.float64), grad.double())
    stock = run(plain, x, copied(block, torch.float32), grad)
    with backends.force("triton"):
        ours = run(
            lambda x, b: dense_block(x, b, memory=memory),
            x.to(device), placed(copied(block, torch.float32), device), grad.to(device),
        )  # fmt: skip
    for i, (o, s, e) in enumerate(zip(ours, stock, exact, strict=True)):
        bound = max(TOLERANCE[torch.float32], 2 * relative_error(s, e))
        assert relative_error(o.cpu(), e) <= bound, f"tensor {i}: {relative_error(o.cpu(), e):.1e}, at most {bound:.1e}"


def test_dense_block_with_dropout(device):
    x, block = torch.randn(2, 16, 5, 6).to(device), placed(copied(layers(2, 16, 8, 16), torch.float32), device)
    with backends.force("triton"):
        y = dense_block(x.requires_grad_(), block, 0.5)
        y.sum().backward()
    zeros = (y[:, 16:] == 0).double().mean().item()
    assert abs(zeros - 0.5) < 0.1
    assert x.grad.isfinite().all()


def test_dense_block_in_inference(device):
    x, block = torch.randn(2, 20, 5, 6), layers(2, 20, 12, 16, training=False)
    with torch.no_grad(), backends.force("triton"):
        y = dense_block(x.to(device), placed(copied(block, torch.float32, grad=False), device))
    assert_close(y.cpu(), plain(x.double(), copied(block, torch.float64)), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [64, 224, 480])
def test_model_layers(channels, dtype, gpu):
    size, mid, out = (28, 28), on_grid(8, 128, 28, 28, dtype=dtype), torch.zeros(8, 32, 28, 28, dtype=dtype)
    bias = (None, torch.full((32,), 4.0), NONE, None)
    into("conv2d_into", out, (mid, weight(32, 128, 3, 3), *affine(128), RELU, *bias, *WHERE, True), gpu)
    out, *args = gradient(channels, 128, RELU, dtype, size)
    for _ in range(2):  # a thread that stores what another has still to read shows in some runs only
        into("pointwise_bwd_into", out, (*args, True, True), gpu)


@pytest.mark.gpu
def test_the_same_bits_on_every_run(gpu):
    out, *args = gradient(224, 128, RELU, torch.bfloat16, (56, 56))
    args, results = on(gpu, args), []
    for _ in range(5):
        dx = out.to(gpu, copy=True)
        results.append((dx, *backend.pointwise_bwd_into(dx, *args, True, True)))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
