"""Statistics whose mean is a thousand deviations, the folding of many tiles, and the same bits on every run."""

from __future__ import annotations

import pytest
import torch

from fastcnn import triton as backend
from fastcnn.triton.reductions import merge_moments, sum_rows
from tests.ops.cases import affine, weight
from tests.tolerances import relative_error
from tests.triton import test_conv2d, test_depthwise_conv2d, test_pointwise_conv2d, test_separable_conv2d
from tests.triton.compare import image, on


@pytest.mark.parametrize("primitive", ["pointwise_fwd", "conv2d_fwd", "depthwise_fwd", "separable_fwd"])
def test_a_mean_of_a_thousand_deviations(primitive, device):
    c, geometry = 6, ((1, 1), (1, 1), (1, 1))
    x = torch.randn(2, 6, 20, 21).contiguous(memory_format=torch.channels_last)
    shift = torch.full((c,), 1e3)
    eye = torch.eye(c)[:, :, None, None]
    centre = torch.zeros(c, 1, 3, 3)
    centre[:, 0, 1, 1] = 1
    none = (None, None, 0)
    tail = (None, shift, 0, None)
    args = {
        "pointwise_fwd": (x, eye, *none, *tail, (1, 1), True),
        "conv2d_fwd": (x, eye * centre[:1], *none, *tail, *geometry, 1, True),
        "depthwise_fwd": (x, centre, *none, *tail, *geometry, True),
        "separable_fwd": (x, centre, eye, *none, *none, *tail, *geometry, True),
    }[primitive]
    y, mean, var = (t.cpu() for t in getattr(backend, primitive)(*on(device, args)))
    exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), unbiased=False)
    assert relative_error(mean, exact_mean) < 1e-6
    # A tile's mean is rounded by up to 1e3 * 2^-24 = 6e-5, and lies about 0.1 from the mean of all: the variance is
    # off by some 1e-5. A difference of sums of squares would be off by 10 %.
    assert relative_error(var, exact_var) < 1e-4


@pytest.mark.parametrize("rows", [1, 255, 257, 700])
def test_folding(rows, device):
    c = 5
    counts = torch.randint(1, 40, (rows,)).float()
    means, deviations = 100 + torch.randn(rows, c), torch.rand(rows, c)
    partials = torch.cat([means.flatten(), deviations.flatten(), counts]).to(device)
    mean, var = (t.cpu() for t in merge_moments(partials, rows, c))
    n, m = counts.double()[:, None], means.double()
    exact = (n * m).sum(0) / n.sum()
    assert relative_error(mean, exact) < 1e-6
    assert relative_error(var, (deviations.double() + n * (m - exact) ** 2).sum(0) / n.sum()) < 1e-5
    assert relative_error(sum_rows(means.to(device)).cpu(), m.sum(0)) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize(
    "primitive",
    ["pointwise_fwd", "pointwise_bwd", "conv2d_fwd", "conv2d_bwd", "depthwise_fwd", "depthwise_bwd", "separable_fwd"],
)
def test_the_same_bits_on_every_run(primitive, gpu):
    dtype, needs, one = torch.bfloat16, (True, True, True), (1, 1)
    layer = (8, 96, 136, (56, 56), (3, 3), (2, 2), one, one, 1)
    args = {
        "pointwise_fwd": lambda: test_pointwise_conv2d.arguments("stats", 8, 96, 136, (56, 56), one, dtype),
        "pointwise_bwd": lambda: test_pointwise_conv2d.arguments("full", 8, 96, 136, (56, 56), one, dtype, needs),
        "conv2d_fwd": lambda: test_conv2d.arguments("stats", *layer, dtype),
        "conv2d_bwd": lambda: test_conv2d.arguments("full", *layer, dtype, needs),
        "depthwise_fwd": lambda: test_depthwise_conv2d.arguments(
            "stats", 8, 96, 1, (56, 56), (3, 3), one, one, one, dtype
        ),
        "depthwise_bwd": lambda: test_depthwise_conv2d.arguments(
            "full", 8, 96, 1, (56, 56), (3, 3), one, one, one, dtype, needs
        ),
        "separable_fwd": lambda: test_separable_conv2d.arguments(
            "stats", 8, 96, 1, 136, (56, 56), (3, 3), one, one, one, dtype
        ),
    }[primitive]()
    placed = on(gpu, args)
    first, second = (getattr(backend, primitive)(*placed) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_tensor_above_two_to_the_31_elements(gpu):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    small = image(1, 64, (64, 64), torch.bfloat16).to(gpu)
    x = small.expand(8200, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    w, taps, (scale, shift) = weight(8, 64, 1, 1).to(gpu), weight(64, 1, 3, 3).to(gpu), (t.to(gpu) for t in affine(64))
    kernel, geometry = weight(8, 64, 3, 3).to(gpu), ((1, 1), (1, 1), (1, 1))
    for name, args in (
        ("pointwise_fwd", (w, scale, shift, 1, None, None, 0, None, (1, 1), False)),
        ("conv2d_fwd", (kernel, scale, shift, 1, None, None, 0, None, *geometry, 1, False)),
        ("depthwise_fwd", (taps, scale, shift, 1, None, None, 0, None, *geometry, False)),
        ("separable_fwd", (taps, w, scale, shift, 1, None, None, 0, None, None, 0, None, *geometry, False)),
    ):
        last = getattr(backend, name)(x, *args)[0][-1:]
        assert torch.equal(last, getattr(backend, name)(small, *args)[0])
