"""The CUDA kernels on a GPU against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastcnn import cuda
from tests.cuda.cases import Shape, arguments, check, error, reference
from tests.cuda.sanitizer_cases import CASES, run_case
from tests.cuda.shapes import BF16, MODEL_LAYERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.unavailable() is not None, reason=f"needs the CUDA backend: {cuda.unavailable()}"),
]


@pytest.mark.small
@pytest.mark.parametrize(("primitive", "shape"), CASES, ids=str)
def test_small_cases_equal_reference(primitive, shape):
    run_case(primitive, shape)


@pytest.mark.parametrize("primitive", ["depthwise_fwd", "depthwise_bwd", "separable_fwd"])
@pytest.mark.parametrize("shape", MODEL_LAYERS, ids=str)
def test_model_layers_equal_reference(primitive, shape):
    args = arguments(primitive, shape, "cuda")
    if cuda.refuses(primitive, args):
        pytest.skip(cuda.refuses(primitive, args))
    check(primitive, shape, getattr(cuda, primitive)(*args), reference(primitive, args))


@pytest.mark.parametrize("primitive", ["depthwise_fwd", "separable_fwd"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_statistics_with_a_mean_of_a_thousand_deviations(primitive, dtype):
    shape = Shape(n=16, k=64, h=56, w=56, channels=96, stats=True, mean=1e3, dtype=dtype)
    y, mean, var = getattr(cuda, primitive)(*arguments(primitive, shape, "cuda"))
    # Of the stored values: in bfloat16 the reference's are other roundings of the same.
    exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), unbiased=False)
    assert error(mean, exact_mean) < 1e-6
    assert error(var, exact_var) < 1e-4


@pytest.mark.parametrize("primitive", ["depthwise_fwd", "depthwise_bwd", "separable_fwd"])
def test_same_inputs_give_the_same_bits(primitive):
    shape = Shape(n=16, k=96, h=28, w=28, channels=48, stats=primitive != "depthwise_bwd", dtype=BF16)
    args = arguments(primitive, shape, "cuda")
    first, second = (getattr(cuda, primitive)(*args) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_tensor_above_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    shape = Shape(n=1, k=64, h=5, w=7, plain=True, dtype=BF16)
    args = list(arguments("depthwise_fwd", shape, "cuda"))
    small = args[0]
    repeat = 2**31 // small.numel() + 1
    args[0] = small.expand(repeat, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    args[8] = None
    y = cuda.depthwise_fwd(*args)[0]
    args[0] = small
    assert torch.equal(y[-1:], cuda.depthwise_fwd(*args)[0])


def test_a_refusal_names_what_came():
    args = list(arguments("depthwise_fwd", Shape(), "cuda"))
    args[0] = args[0].double()
    assert "float64" in cuda.refuses("depthwise_fwd", args)


def test_kernels_run_on_the_current_stream():
    shape = replace(MODEL_LAYERS[0], n=2)
    args = arguments("depthwise_fwd", shape, "cuda")
    expected = cuda.depthwise_fwd(*args)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = cuda.depthwise_fwd(*args)[0]
    stream.synchronize()
    assert torch.equal(y, expected)
