"""local_response_norm_fwd and local_response_norm_bwd."""

from __future__ import annotations

import pytest
import torch

from fastcnn.triton.local_response_norm import MAX_UNROLLED
from tests.ops.cases import LAYOUTS
from tests.triton.compare import DTYPES, check, image

SHAPES = ((1, 1, (2, 3)), (1, 33, (7, 12)), (2, 24, (5, 5)), (1, 300, (4, 3)), (0, 4, (6, 6)))
# size, alpha, beta, k; the last two sizes are those around where the loops are unrolled
PARAMETERS = (
    (5, 1e-4, 0.75, 1.0),
    (4, 2.0, 0.5, 0.5),
    (2, 1.0, -0.6, 2.0),
    (MAX_UNROLLED, 3.0, 1.0, 1.0),
    (MAX_UNROLLED + 1, 3.0, 0.75, 1.0),
)


def arguments(shape, parameters, dtype, layout="nhwc") -> tuple[tuple, tuple]:
    """Arguments of the forward and of the backward."""
    n, c, size = shape
    x, grad = image(n, c, size, dtype, layout), image(n, c, size, dtype, layout)
    return (x, *parameters), (grad, x, *parameters)


def check_both(shape, parameters, dtype, device, layout="nhwc") -> None:
    forward, backward = arguments(shape, parameters, dtype, layout)
    check("local_response_norm_fwd", forward, device)
    check("local_response_norm_bwd", backward, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_values_and_gradients(dtype, parameters, device):
    check_both((2, 7, (9, 6)), parameters, dtype, device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, device):
    check_both(shape, PARAMETERS[1], torch.float32, device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    check_both((2, 19, (6, 8)), PARAMETERS[1], torch.float32, device, layout)


@pytest.mark.parametrize("size", [1, 40, 10**9])
def test_windows_of_one_and_of_more_than_all(size, device):
    check_both((1, 6, (3, 4)), (size, float(size), 0.75, 1.0), torch.float32, device)


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_range(scale, device):
    (x, *parameters), (grad, *_) = arguments((1, 19, (4, 4)), PARAMETERS[0], torch.float32)
    check("local_response_norm_fwd", (x * scale, *parameters), device)
    check("local_response_norm_bwd", (grad, x * scale, *parameters), device)
