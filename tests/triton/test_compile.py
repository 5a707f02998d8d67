"""What the compiler makes of every kernel, for sm_80 and sm_90, without a GPU: no spills, shared memory in bounds."""

from __future__ import annotations

import re

import pytest
import torch

from fastcnn import triton as backend
from fastcnn.ops.dropout import CHANNEL, ELEMENT, SAMPLE
from fastcnn.triton.launch import INTERPRETED
from fastcnn.triton.local_response_norm import MAX_UNROLLED
from tests.ops.cases import affine, on_grid
from tests.triton import test_avg_pool2d as avg_pool2d
from tests.triton import test_capsule_routing as capsules
from tests.triton import test_conv2d as conv2d
from tests.triton import test_depthwise_conv2d as depthwise
from tests.triton import test_local_response_norm as local_response_norm
from tests.triton import test_pointwise_conv2d as pointwise
from tests.triton import test_separable_conv2d as separable
from tests.triton.ahead_of_time import Resources, compile_for, launches_of
from tests.triton.compare import image

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter is on (TRITON_INTERPRET=1)")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ONE, ALL = (1, 1), (True, True, True)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # what a block may ask for
N, SIZE = 8, (56, 56)  # large enough for the large tiles


def compiled(primitive: str, args: tuple, capability: int, folding: bool = False) -> dict[str, Resources]:
    """The kernels of a call by name, each compiled and checked for spills, registers and shared memory."""
    kernels = {}
    for launch in launches_of(getattr(backend, primitive), args, folding):
        made = kernels[launch.name] = compile_for(launch, capability)
        assert made.stack == 0, f"{launch.name} spills {made.stack} bytes ({made.registers} registers)"
        assert made.registers * made.threads <= 65536, f"{launch.name}: {made.registers} registers x {made.threads}"
        assert made.shared <= SHARED_MEMORY[capability], f"{launch.name}: {made.shared} bytes of shared memory"
    assert kernels
    return kernels


def convolution(kernel: int, stride: int = 1) -> tuple:
    """kernel, stride, padding, dilation of a convolution that keeps (or halves) the image."""
    return (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), ONE


@pytest.mark.parametrize(("dtype", "capability"), [(BF16, 90), (FP16, 90), (FP32, 90), (BF16, 80), (FP32, 80)], ids=str)
def test_pointwise_forward(dtype, capability):
    # Training form: prologue and statistics. 144 channels are no multiple of the 64-channel block.
    args = pointwise.arguments("prologue", N, 144, 136, SIZE, ONE, dtype)
    made = compiled("pointwise_fwd", (*args[:-1], True), capability, folding=dtype == BF16)
    ptx = made["pointwise_fwd_kernel"].ptx
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx
    assert "cp.async" in ptx, "the loads are not pipelined"


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_pointwise_forward_inference(dtype):
    made = compiled("pointwise_fwd", pointwise.arguments("epilogue", N, 24, 144, SIZE, ONE, dtype), 90)
    assert "wgmma.mma_async" in made["pointwise_fwd_kernel"].ptx


@pytest.mark.parametrize(("dtype", "capability"), [(BF16, 90), (FP32, 90), (FP16, 80), (FP32, 80)], ids=str)
def test_pointwise_backward(dtype, capability):
    args = pointwise.arguments("full", N, 256, 512, (28, 28), ONE, dtype, ALL)
    made = compiled("pointwise_bwd", args, capability)
    assert set(made) == {"pointwise_dgrad_kernel", "pointwise_wgrad_kernel"}
    if capability == 90:
        assert all("wgmma.mma_async" in kernel.ptx for kernel in made.values())


def test_pointwise_backward_of_a_masked_gradient():
    compiled("pointwise_bwd", pointwise.arguments("masked", N, 256, 512, (28, 28), ONE, FP32, (False, True, False)), 80)


def test_pointwise_strided():
    compiled("pointwise_fwd", pointwise.arguments("prologue", N, 64, 128, SIZE, (2, 2), BF16), 90)
    compiled("pointwise_bwd", pointwise.arguments("full", N, 64, 128, SIZE, (2, 2), BF16, ALL), 90)


# K, C, geometry, groups
CONV2D = {
    "3x3": (144, 136, *convolution(3), 1),  # 9 taps of 144 channels: a block of 64 spans two taps
    "stride2": (64, 128, *convolution(3, 2), 1),
    "stem3": (3, 32, *convolution(3, 2), 1),
    "stem7": (3, 64, *convolution(7, 2), 1),
    "groups": (128, 128, *convolution(3), 32),
    "odd": (17, 33, *convolution(3), 1),
}
SLOW_CONV2D = [
    pytest.param(layer, dtype, capability, marks=pytest.mark.slow)
    for layer in CONV2D
    for dtype, capability in [(BF16, 90), (BF16, 80), (FP32, 90), (FP32, 80)]
]


def conv2d_arguments(layer: str, variant: str, dtype: torch.dtype, needs: tuple | None = None) -> tuple:
    """Arguments of conv2d_fwd or conv2d_bwd for a layer of CONV2D."""
    k, c, *geometry = CONV2D[layer]
    return conv2d.arguments(variant, N, k, c, SIZE, *geometry, dtype, needs)


@pytest.mark.parametrize(
    ("layer", "dtype", "capability"),
    [("3x3", BF16, 90), ("3x3", FP16, 90), ("3x3", FP32, 80), ("stem7", BF16, 90), *SLOW_CONV2D],
    ids=str,
)
def test_conv2d_forward(layer, dtype, capability):
    made = compiled("conv2d_fwd", (*conv2d_arguments(layer, "prologue", dtype)[:-1], True), capability)
    ptx = made["conv2d_fwd_kernel"].ptx
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx
    if CONV2D[layer][0] % 8 == 0:
        assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10,", ptx), "the gathered loads are not of 16 bytes"


@pytest.mark.parametrize(
    ("layer", "dtype", "capability"), [("stem3", BF16, 90), ("3x3", BF16, 80), *SLOW_CONV2D], ids=str
)
def test_conv2d_forward_inference(layer, dtype, capability):
    compiled("conv2d_fwd", conv2d_arguments(layer, "epilogue", dtype), capability)


@pytest.mark.parametrize(
    ("layer", "variant", "dtype", "capability"),
    [
        ("3x3", "full", BF16, 90),
        ("3x3", "full", FP16, 90),
        ("3x3", "full", FP32, 80),
        ("3x3", "smooth", BF16, 90),
        ("stride2", "full", BF16, 90),
        *(
            pytest.param(case.values[0], variant, *case.values[1:], marks=pytest.mark.slow)
            for variant in ("plain", "full", "smooth")
            for case in SLOW_CONV2D
        ),
    ],
    ids=str,
)
def test_conv2d_backward(layer, variant, dtype, capability):
    made = compiled("conv2d_bwd", conv2d_arguments(layer, variant, dtype, ALL), capability)
    assert set(made) == {"conv2d_dgrad_kernel", "conv2d_wgrad_kernel"}
    if capability == 90:
        assert "wgmma.mma_async" in made["conv2d_dgrad_kernel"].ptx
        # The rows of a weight gradient's product are output channels, and wgmma takes 64.
        assert ("wgmma.mma_async" in made["conv2d_wgrad_kernel"].ptx) == (CONV2D[layer][1] > 32 and layer != "groups")


def test_pointwise_backward_of_few_channels():
    # A tile of 32 columns holds as many gradients as one of 128, and a SiLU's derivative more than a ReLU's.
    for k, variant in ((24, "full"), (256, "smooth")):
        compiled("pointwise_bwd", pointwise.arguments(variant, N, k, 144, SIZE, ONE, BF16, ALL), 90)


@pytest.mark.parametrize(
    ("geometry", "dtype", "capability"),
    [
        (convolution(3), BF16, 90),
        (convolution(3), FP32, 80),
        (convolution(3, 2), FP16, 80),
        (convolution(5), BF16, 90),
        (convolution(7), FP32, 90),
        (convolution(31), BF16, 90),
    ],
    ids=str,
)
def test_depthwise_forward(geometry, dtype, capability):
    args = depthwise.arguments("prologue", N, 144, 1, SIZE, *geometry, dtype)
    made = compiled("depthwise_fwd", (*args[:-1], True), capability)
    if dtype == BF16 and geometry == convolution(3):
        # 2 x 4 outputs a group: each of 4 x 6 inputs and 9 taps is loaded once, 4 channels at a time.
        assert made["depthwise_fwd_kernel"].ptx.count(".v2.b32 {") == 24 + 9


@pytest.mark.parametrize(
    ("geometry", "dtype", "capability"),
    [
        (convolution(3), BF16, 90),
        (convolution(3), FP32, 80),
        (convolution(3, 2), FP16, 80),
        (convolution(7), BF16, 90),
        pytest.param(convolution(5), BF16, 90, marks=pytest.mark.slow),
        pytest.param(convolution(5), FP32, 80, marks=pytest.mark.slow),
        pytest.param(convolution(31), BF16, 90, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_depthwise_backward(geometry, dtype, capability):
    args = depthwise.arguments("full", N, 144, 1, SIZE, *geometry, dtype, ALL)
    made = compiled("depthwise_bwd", args, capability)
    one_pass = geometry[0][0] <= 5
    assert set(made) == ({"depthwise_bwd_kernel"} if one_pass else {"depthwise_dgrad_kernel", "depthwise_wgrad_kernel"})


@pytest.mark.parametrize(
    ("variant", "c", "geometry", "dtype", "capability"),
    [
        ("stats", 128, convolution(3), BF16, 90),
        ("prologue", 256, convolution(3), FP32, 90),
        ("epilogue", 24, convolution(3), BF16, 90),
        ("prologue", 160, convolution(3, 2), FP16, 80),
        ("epilogue", 64, convolution(5), FP32, 80),
    ],
    ids=str,
)
def test_separable(variant, c, geometry, dtype, capability):
    args = separable.arguments(variant, N, 144, 1, c, SIZE, *geometry, dtype)
    made = compiled("separable_fwd", args, capability)
    assert set(made) == {"separable_fwd_kernel"}
    if capability == 90:
        assert "wgmma.mma_async" in made["separable_fwd_kernel"].ptx


@pytest.mark.parametrize(("dtype", "capability"), [(BF16, 90), (FP32, 80)], ids=str)
def test_affine_act(dtype, capability):
    y, grad = image(N, 144, SIZE, dtype), on_grid(N, 144, *SIZE, dtype=dtype)
    compiled("affine_act_fwd", (y, *affine(144), 3, grad), capability)
    compiled("affine_act_into", (prefix(256, dtype), prefix(256, dtype, 256), *affine(256), 1, None), capability)
    compiled("affine_act_sums", (grad, y, *affine(144), 3, torch.randn(144)), capability, folding=True)
    compiled("affine_act_dgrad", (grad, y, *affine(144), 1, torch.randn(4, 144), y), capability)
    compiled("residual_act_bwd", (grad, y, 1, y, torch.randn(144), True), capability, folding=True)
    compiled("channel_statistics", (y,), capability, folding=True)


def prefix(channels: int, dtype: torch.dtype, buffer: int = 512) -> torch.Tensor:
    """The first channels of a dense block's buffer."""
    whole = torch.empty(N, buffer, 28, 28, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    return whole[:, :channels]


# DenseNet-121's second block: a prefix of 256 channels, 128 of the 1x1 convolution, 32 of the 3x3. Below it its last
# block's longest prefix, and DenseNet-161's growth of 48.
DENSE = [
    (256, 128, 32, BF16, 90),
    (256, 128, 32, FP32, 80),
    pytest.param(256, 128, 32, FP32, 90, marks=pytest.mark.slow),
    pytest.param(256, 128, 32, BF16, 80, marks=pytest.mark.slow),
    pytest.param(256, 128, 32, FP16, 90, marks=pytest.mark.slow),
    pytest.param(480, 192, 48, BF16, 90, marks=pytest.mark.slow),
    pytest.param(480, 192, 48, FP32, 80, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("channels", "middle", "growth", "dtype", "capability"), DENSE, ids=str)
def test_dense_layer(channels, middle, growth, dtype, capability):
    x, mid, none = prefix(channels, dtype), prefix(middle, dtype, middle), (None, None, 0, None)
    grad = y = prefix(growth, dtype)
    w1, w2 = torch.empty(middle, channels, 1, 1), torch.empty(growth, middle, 3, 3)
    first, second, where = (*affine(channels), 1), (*affine(middle), 1), (ONE, ONE, ONE, 1)
    made = compiled("pointwise_fwd", (x, w1, *first, *none, ONE, True), capability)
    made |= compiled("conv2d_into", (y, mid, w2, *second, *none, *where, True), capability)
    if dtype != FP32:
        store = r"st\.global\.v4\.b32"
        assert re.search(store, made["conv2d_fwd_kernel"].ptx), "a slice is not written in vectors"
    source, coef = (mid, *second, torch.empty(middle)), torch.empty(4, growth)
    compiled("conv2d_bwd", (grad, y, None, None, 0, coef, *source, w2, None, *where, *ALL), capability)
    upstream, source = (mid, mid, None, None, 0, torch.empty(4, middle)), (x, *first, torch.empty(channels))
    made = compiled("pointwise_bwd_into", (prefix(channels, dtype), *upstream, *source, w1, True, True), capability)
    assert set(made) == {"pointwise_dgrad_kernel", "pointwise_wgrad_kernel"}
    if capability == 90:
        assert "wgmma.mma_async" in made["pointwise_dgrad_kernel"].ptx


@pytest.mark.parametrize(("dtype", "capability"), [(BF16, 90), (FP32, 80)], ids=str)
def test_accumulated_gradient_without_sums(dtype, capability):
    x, mid = prefix(256, dtype), prefix(128, dtype, 128)
    upstream, source = (mid, mid, None, None, 0, torch.empty(4, 128)), (x, *affine(256), 1, None)
    args = (prefix(256, dtype), *upstream, *source, torch.empty(128, 256, 1, 1), False, False)
    compiled("pointwise_bwd_into", args, capability)


@pytest.mark.parametrize("window", [((2, 2), (2, 2), (0, 0), True), ((3, 3), (2, 2), ONE, False)], ids=str)
@pytest.mark.parametrize(("dtype", "capability"), [(BF16, 90), (FP32, 80)], ids=str)
def test_avg_pool2d(dtype, capability, window):
    forward, backward = avg_pool2d.arguments((N, 256, SIZE), window, dtype, 1)
    compiled("avg_pool2d_fwd", forward, capability)
    compiled("avg_pool2d_bwd", (*backward, True), capability, folding=True)


@pytest.mark.parametrize("size", [5, MAX_UNROLLED, MAX_UNROLLED + 1])
@pytest.mark.parametrize(("dtype", "capability"), [(BF16, 90), (FP32, 80)], ids=str)
def test_local_response_norm(dtype, capability, size):
    for channels in (64, 192):
        forward, backward = local_response_norm.arguments((N, channels, SIZE), (size, 1e-4, 0.75, 1.0), dtype)
        compiled("local_response_norm_fwd", forward, capability)
        made = compiled("local_response_norm_bwd", backward, capability)
        if size <= MAX_UNROLLED:
            # 4 elements a thread, each with a gradient for every window that it is in and all that those windows see.
            loads = made["local_response_norm_kernel"].ptx.count("ld.global")
            assert loads == 4 * (size + 2 * size - 1), "neighbours are loaded more than once"


@pytest.mark.parametrize("unit", [ELEMENT, CHANNEL, SAMPLE])
@pytest.mark.parametrize(("dtype", "capability"), [(BF16, 90), (FP32, 80)], ids=str)
def test_dropout(dtype, capability, unit):
    x, bias, seed = image(N, 144, SIZE, dtype), affine(144)[1], torch.tensor([1, 2])
    compiled("dropout_fwd", (x, bias, 1, x, 0.5, 2.0, unit, seed), capability)
    compiled("dropout_fwd", (x, None, 0, None, 0.5, 2.0, unit, seed), capability)
    compiled("dropout_bwd", (x, x, bias, 3, 0.5, 2.0, unit, seed, True), capability)


# The paper's layer, in half precision with float32 weights; then more and wider output capsules, and wider inputs.
@pytest.mark.parametrize(
    ("shape", "dtype", "capability"),
    [
        (capsules.PAPER, FP32, 90),
        (capsules.PAPER, BF16, 90),
        pytest.param(capsules.PAPER, FP32, 80, marks=pytest.mark.slow),
        pytest.param(capsules.PAPER, FP16, 80, marks=pytest.mark.slow),
        pytest.param((100, 512, 8, 100, 32), FP32, 90, marks=pytest.mark.slow),
        pytest.param((100, 1152, 16, 10, 16), BF16, 90, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_capsule_routing(shape, dtype, capability):
    batch, in_caps, in_dim, out_caps, out_dim = shape
    u = torch.empty(batch, in_caps, in_dim, dtype=dtype, device="meta")
    weight = torch.empty(in_caps, out_caps, in_dim, out_dim, device="meta")
    grad, s = u.new_empty(batch, out_caps, out_dim), weight.new_empty(3, batch, out_caps, out_dim)
    made = compiled("capsule_routing_fwd", (u, weight, s[0, 0], 3, True), capability)
    made |= compiled("capsule_routing_bwd", (grad, u, weight, s, True, False, True, True), capability, folding=True)
    if capability == 90:
        assert "wgmma.mma_async" in made["capsule_sums_kernel"].ptx
    assert "cp.async" in made["capsule_sums_kernel"].ptx, "the loads are not pipelined"


@pytest.mark.parametrize(("dtype", "capability"), [(BF16, 90), (FP32, 80)], ids=str)
def test_squash(dtype, capability):
    for dim in (16, 5000):
        s = torch.empty(1000, dim, dtype=dtype, device="meta")
        compiled("squash_fwd", (s,), capability)
        compiled("squash_bwd", (s, s), capability)
