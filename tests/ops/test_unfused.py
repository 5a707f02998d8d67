"""Which calls the cpu backend leaves to torch's convolution, and that explain says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fastcnn import backends, explain, native
from fastcnn.cpu import measured
from fastcnn.cpu.conv2d import pack_conv2d
from fastcnn.nn import DepthwiseConv2d
from fastcnn.ops import conv2d

ONE = (1, 1)


AMD, INTEL = "AuthenticAMD", "GenuineIntel"


@pytest.fixture(autouse=True)
def measured_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An instruction set and, unless a test says otherwise, a processor for which there are measurements."""
    monkeypatch.setattr(measured, "vendor", lambda: AMD)
    module = native.module()
    isas = [isa for isa in measured.ISAS if module and isa in module.isa_available()]
    if not isas:
        pytest.skip(f"needs one of {', '.join(measured.ISAS)}")
    before = module.isa_active()
    module.set_isa(isas[-1])
    yield
    module.set_isa(before)


def forward(channels: int, groups: int, size: int, dtype: torch.dtype) -> tuple:
    x = torch.randn(1, channels, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels // groups, 3, 3)
    return x, weight, None, None, 0, None, None, 0, None, ONE, ONE, ONE, groups, True


def backward(args: tuple, need_sums: bool) -> tuple:
    x, weight, *_, groups, _ = args
    upstream = (torch.randn_like(x), None, None, None, 0, None)
    return (*upstream, x, None, None, 0, None, weight, None, ONE, ONE, ONE, groups, True, True, need_sums)


@pytest.mark.parametrize(
    ("vendor", "channels", "groups", "size", "dtype", "expected"),
    [
        (AMD, 1024, 32, 7, torch.float32, "unfused"),
        (AMD, 1024, 32, 14, torch.float32, "cpu"),
        (AMD, 512, 32, 7, torch.float32, "cpu"),
        (AMD, 256, 32, 28, torch.bfloat16, "unfused"),
        (AMD, 128, 32, 28, torch.bfloat16, "cpu"),
        (AMD, 64, 1, 7, torch.bfloat16, "cpu"),
        (INTEL, 512, 32, 14, torch.float32, "unfused"),
        (INTEL, 512, 32, 15, torch.float32, "cpu"),
        (INTEL, 256, 32, 14, torch.float32, "cpu"),
        (INTEL, 1024, 32, 7, torch.bfloat16, "unfused"),
        (INTEL, 512, 32, 7, torch.bfloat16, "cpu"),
        ("HygonGenuine", 1024, 32, 7, torch.float32, "cpu"),
    ],
)
def test_grouped_convolutions(
    vendor: str, channels: int, groups: int, size: int, dtype: torch.dtype, expected: str, monkeypatch
) -> None:
    monkeypatch.setattr(measured, "vendor", lambda: vendor)
    args = forward(channels, groups, size, dtype)
    assert backends.selected("conv2d_fwd", args) == expected
    assert backends.selected("conv2d_bwd", backward(args, need_sums=False)) == expected
    with backends.force("cpu"):
        assert backends.selected("conv2d_fwd", args) == "cpu"


@pytest.mark.parametrize(
    ("vendor", "isa", "shape", "outputs", "kernel", "stride", "expected"),
    [
        (INTEL, "avx512", (128, 1, 32, 32), 6, 5, 1, "unfused"),
        (INTEL, "amx", (128, 6, 14, 14), 16, 5, 1, "unfused"),
        (INTEL, "avx512", (8, 6, 14, 14), 16, 5, 1, "cpu"),
        (INTEL, "avx512", (128, 8, 14, 14), 16, 5, 1, "cpu"),
        (INTEL, "avx512", (8, 3, 224, 224), 64, 3, 1, "cpu"),
        (INTEL, "avx512", (8, 3, 224, 224), 64, 7, 2, "unfused"),
        (INTEL, "avx512", (128, 6, 32, 32), 16, 1, 1, "cpu"),
        (AMD, "avx2", (128, 1, 32, 32), 6, 5, 1, "unfused"),
        (AMD, "avx512", (128, 1, 32, 32), 6, 5, 1, "cpu"),
    ],
)
def test_few_channels(
    vendor: str, isa: str, shape: tuple, outputs: int, kernel: int, stride: int, expected: str, monkeypatch
) -> None:
    module = native.module()
    if isa not in module.isa_available():
        pytest.skip(f"needs {isa}")
    module.set_isa(isa)
    monkeypatch.setattr(measured, "vendor", lambda: vendor)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    weight, where = torch.randn(outputs, shape[1], kernel, kernel), ((stride, stride), (0, 0), ONE, 1)
    args = (x, weight, None, None, 0, None, None, 0, None, *where, True)
    assert backends.selected("conv2d_fwd", args) == expected
    y = backends.choose("conv2d_fwd", args)(*args)[0]
    upstream = (torch.randn_like(y), None, None, None, 0, None)
    back = (*upstream, x, None, None, 0, None, weight, None, *where, False, True, False)
    assert backends.selected("conv2d_bwd", back) == expected
    with torch.inference_mode():
        packed = (x, pack_conv2d(weight, x.dtype, 1), *args[2:])
    assert backends.selected("conv2d_fwd", packed) == "cpu"
    if isa == "amx":
        narrow = tuple(a.bfloat16() if i < 2 else a for i, a in enumerate(args))
        assert backends.selected("conv2d_fwd", narrow) == "cpu"


def test_strided_groups_stay_on_intel(monkeypatch) -> None:
    monkeypatch.setattr(measured, "vendor", lambda: INTEL)
    x, weight, *head, _, padding, dilation, groups, stats = forward(1024, 32, 14, torch.float32)
    strided = (x, weight, *head, (2, 2), padding, dilation, groups, stats)
    assert backends.selected("conv2d_fwd", strided) == "cpu"


def test_plain_depthwise_convolutions(monkeypatch) -> None:
    x, weight = torch.randn(2, 64, 56, 56).contiguous(memory_format=torch.channels_last), torch.randn(64, 1, 3, 3)
    scale, where = torch.ones(64), (ONE, ONE, ONE)
    plain = (x, weight, None, None, 0, None, None, 0, None, *where, False)
    fused = (
        (x, weight, scale, None, 0, None, None, 0, None, *where, False),
        (x, weight, None, None, 1, None, None, 0, None, *where, False),
        (x, weight, None, None, 0, None, scale, 0, None, *where, False),
        (x, weight, None, None, 0, None, None, 0, x, *where, False),
        (x, weight, None, None, 0, None, None, 0, None, *where, True),
    )
    assert backends.selected("depthwise_fwd", plain) == "unfused"
    assert {backends.selected("depthwise_fwd", args) for args in fused} == {"cpu"}
    monkeypatch.setattr(measured, "vendor", lambda: INTEL)
    assert backends.selected("depthwise_fwd", plain) == "cpu"


def test_what_the_unfused_backend_refuses_stays() -> None:
    args = forward(256, 32, 28, torch.bfloat16)
    assert backends.selected("conv2d_bwd", backward(args, need_sums=True)) == "cpu"


def test_sets_without_measurements_keep_their_calls() -> None:
    native.module().set_isa("portable")
    assert backends.selected("conv2d_fwd", forward(256, 32, 28, torch.bfloat16)) == "cpu"


def test_explain_names_the_reason() -> None:
    layer = DepthwiseConv2d(64, 64, 3, padding=1, bias=False)
    rows = explain(nn.Sequential(layer), torch.randn(2, 64, 56, 56)).rows
    (row,) = [r for r in rows if r.op == "depthwise_fwd"]
    assert (row.backend, row.why) == (
        "unfused", "cpu: depthwise outputs of 1.5 to 32 MiB with nothing to fuse are measured faster there",
    )  # fmt: skip
    rows = explain(nn.Sequential(layer), torch.randn(2, 64, 14, 14)).rows
    assert [r.backend for r in rows if r.op == "depthwise_fwd"] == ["cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_both_backends(dtype: torch.dtype) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        x = torch.randn(2, 1024, 7, 7).to(dtype).requires_grad_()
        weight = (torch.randn(1024, 32, 3, 3) / 17).requires_grad_()
        y = conv2d(x, weight, padding=1, groups=32)
        y.backward(torch.randn(y.shape).to(dtype))
        return [y, x.grad, weight.grad]

    left = run()
    with backends.force("cpu"):
        own = run()
    for a, b in zip(left, own, strict=True):
        assert (a.float() - b.float()).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * b.float().norm()
