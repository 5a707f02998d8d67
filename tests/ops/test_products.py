"""The fused primitives on the matrix-product core, and what every product promises."""

from __future__ import annotations

import pytest
import torch

from fastcnn import native
from fastcnn.ops.layout import conv_out_sizes
from tests.ops import cases, test_pointwise_conv2d
from tests.ops.cases import DTYPES, FORWARD, NEEDS

ONE = (1, 1)
# n, k, c, h, w, kernel, stride, padding, dilation, multiplier
SEPARABLE = [
    (2, 16, 24, 15, 17, (3, 3), (2, 2), ONE, ONE, 1),
    (4, 33, 17, 7, 9, (3, 3), ONE, ONE, ONE, 1),
    (1, 5, 7, 16, 17, (5, 5), ONE, (2, 2), ONE, 2),
    (1, 40, 30, 12, 9, (7, 7), ONE, (3, 3), ONE, 1),
    (5, 7, 9, 9, 9, (3, 3), (2, 2), (2, 2), (2, 2), 1),
    (1, 520, 64, 10, 10, (3, 3), ONE, ONE, ONE, 1),
]


def out_size(h, w, kernel, stride, padding, dilation):
    return conv_out_sizes((h, w), kernel, stride, padding, dilation)


def separable_args(geometry, variant, dtype):
    n, k, c, h, w, kernel, *where, m = geometry
    x = cases.on_grid(n, k, h, w, dtype=dtype)
    weights = cases.weight(k * m, 1, *kernel), cases.weight(c, k * m, 1, 1, dtype=dtype)
    middle = (*cases.affine(k * m), cases.RELU6) if variant == "epilogue" else (None, None, cases.NONE)
    tail = cases.forward_tail((n, c, *out_size(h, w, kernel, *where)), variant, dtype)
    return (x, *weights, *cases.forward_head(k, variant), *middle, *tail, *where, variant == "stats")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("geometry", SEPARABLE)
def test_separable_forward(geometry, variant, dtype, backend, poison):
    cases.check("separable_fwd", separable_args(geometry, variant, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("geometry", [g for g in SEPARABLE if g[-1] == 1])
def test_inverted_residual_forward(geometry, project, dtype, backend, poison):
    n, k, c, h, w, kernel, *where, _ = geometry
    hidden = k + 13
    x = cases.on_grid(n, k, h, w, dtype=dtype)
    weights = (cases.weight(hidden, k, 1, 1, dtype=dtype), cases.weight(hidden, 1, *kernel))
    last = cases.weight(c, hidden, 1, 1, dtype=dtype) if project else None
    residual = cases.on_grid(n, c if project else hidden, *out_size(h, w, kernel, *where), dtype=dtype)
    tail = (*cases.affine(c), cases.NONE) if project else (None, None, cases.NONE)
    inner = (*cases.affine(hidden), cases.RELU6) * 2
    args = (x, *weights, last, *cases.forward_head(k, "prologue"), *inner, *tail, residual, *where)
    cases.check("inverted_residual_fwd", args, backend)


def test_opcheck(backend):
    cases.check_opcheck("separable_fwd", separable_args(SEPARABLE[0], "epilogue", torch.float32), backend)


@pytest.mark.parametrize("primitive", ["pointwise_fwd", "separable_fwd", "depthwise_fwd"])
def test_statistics_survive_a_large_mean(primitive, backend):
    x = (torch.randn(4, 16, 28, 28) + 1e3).contiguous(memory_format=torch.channels_last)
    identity, centre = torch.eye(16)[:, :, None, None], torch.zeros(16, 1, 3, 3)
    centre[:, :, 1, 1] = 1
    head, tail, where = (None, None, 0), (None, None, 0, None), (ONE, ONE, ONE, True)
    args = {
        "pointwise_fwd": (x, identity, *head, *tail, ONE, True),
        "depthwise_fwd": (x, centre, *head, *tail, *where),
        "separable_fwd": (x, centre, identity, *head, *head, *tail, *where),
    }[primitive]
    cases.check(primitive, args, backend)


@pytest.mark.skipif(native.module() is None, reason="native module not built")
@pytest.mark.parametrize("primitive", ["pointwise_bwd", "separable_fwd"])
def test_bits_do_not_depend_on_threads(primitive):
    if primitive == "pointwise_bwd":
        args = test_pointwise_conv2d.backward_args((4, 24, 144, 20, 21, ONE), "full", NEEDS[0])
    else:
        args = separable_args((3, 24, 40, 20, 21, (3, 3), ONE, ONE, ONE, 1), "stats", torch.float32)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(getattr(torch.ops.fastcnn, primitive)(*args))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
