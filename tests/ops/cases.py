"""Inputs for the primitives' tests, and the comparison with the float64 reference.

Values lie on a grid on which scale * v + shift is exact in every dtype and never at a kink of an activation:
otherwise one element in ten million has another derivative in float32 than in float64, and a test fails by chance.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastcnn import backends
from fastcnn.ops import activations
from tests.tolerances import assert_close

NONE, RELU, RELU6, SILU, HARDSWISH = range(len(activations.NAMES))
DTYPES = (torch.float32, torch.bfloat16)
CHANNELS = (1, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 64, 65, 144)


def on_grid(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 1/64 in (-2, 2); NHWC for four dimensions."""
    x = (torch.randint(-127, 128, shape) / 64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights that keep the output's size: each output sums shape[1] * R * S products."""
    fan_in = shape[1] * shape[2] * shape[3]
    return (torch.randn(shape) / fan_in**0.5).to(dtype)


def affine(channels: int) -> tuple[Tensor, Tensor]:
    """A scale of powers of two and a shift of odd multiples of 1/256."""
    scale = torch.tensor([0.5, 1.0, -1.0, 2.0])[torch.randint(4, (channels,))]
    return scale, (2 * torch.randint(-200, 200, (channels,)) + 1) / 256


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values as NCHW, as a channel slice of a wider NHWC buffer, or with gaps between pixels."""
    if layout == "nchw":
        return x.contiguous()
    n, c, h, w = x.shape
    if layout == "slice":
        buffer = torch.full((n, h, w, c + 5), float("nan"), dtype=x.dtype)
        view = buffer.permute(0, 3, 1, 2)[:, 3 : 3 + c]
    else:
        buffer = torch.full((n, h, 2 * w, c), float("nan"), dtype=x.dtype)
        view = buffer.permute(0, 3, 1, 2)[..., ::2]
    view.copy_(x)
    return view


LAYOUTS = ("nchw", "slice", "gaps")


def require(backend: str, primitive: str) -> None:
    """Skips the test when the backend has no such primitive yet."""
    if backend != "reference" and getattr(importlib.import_module(f"fastcnn.{backend}"), primitive, None) is None:
        pytest.skip(f"the {backend} backend has no {primitive}")


def as64(value: object) -> object:
    """A floating tensor in float64, anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(primitive: str, args: tuple, backend: str) -> None:
    """Runs a primitive on a forced backend and compares every output with the float64 reference of the same inputs."""
    require(backend, primitive)
    if backend == "unfused" and (reason := backends.refusal(backend, primitive, args)):
        pytest.skip(reason)
    ran = []

    def observer(name, args, which, function):
        ran.append((name, which))
        return function(*args)

    with backends.force(backend), backends.observe(observer):
        actual = getattr(torch.ops.fastcnn, primitive)(*args)
    assert ran[0] == (primitive, backend)
    expected = backends.REFERENCES[primitive](*map(as64, args))
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if i == 0 and a.dim() == 4:
            assert a.dtype == args[0].dtype
            assert a.is_contiguous(memory_format=torch.channels_last)
        if i == 1 and len(expected) == 3 and primitive.endswith("_fwd") and e.numel():
            # A mean of values around zero has no digits of its own: its error is measured against the values' size.
            a, e = a - e, torch.zeros_like(e)
            a = a / (expected[1].square() + expected[2]).sum().sqrt().clamp_min(torch.finfo(e.dtype).tiny)
        assert_close(a, e, args[0].dtype, f"{primitive} output {i}")


def check_opcheck(primitive: str, args: tuple, backend: str) -> None:
    """torch's own check of schema, fake and compiled form."""
    require(backend, primitive)
    with backends.force(backend):
        torch.library.opcheck(getattr(torch.ops.fastcnn, primitive).default, args)


def _value_and_gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The function's value, and the gradients of all its tensors under the upstream gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    y.backward(grad.to(y.dtype))
    return [y, *(t.grad for t in leaves)]


def compare_gradients(
    function: Callable[..., Tensor], plain: Callable[..., Tensor], tensors: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Compares a public function's value and gradients in dtype with those of the plain torch form in float64."""
    exact = [t.double() for t in tensors]
    grad = torch.randn(plain(*exact).shape, dtype=dtype)
    actual, expected = _value_and_gradients(function, tensors, grad), _value_and_gradients(plain, exact, grad)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == dtype
        assert_close(a, e, dtype, f"gradient of tensor {i - 1}" if i else "value")


def forward_head(channels: int, variant: str) -> tuple:
    """in_scale, in_shift, in_act of a forward."""
    return (*affine(channels), RELU6) if variant == "prologue" else (None, None, NONE)


def forward_tail(shape: tuple[int, ...], variant: str, dtype: torch.dtype) -> tuple:
    """out_scale, out_shift, out_act, residual for an output of this shape."""
    if variant == "epilogue":
        return (*affine(shape[1]), HARDSWISH, on_grid(*shape, dtype=dtype))
    if variant == "act_after_residual":
        return (*affine(shape[1]), RELU6 + activations.AFTER_RESIDUAL, on_grid(*shape, dtype=dtype))
    if variant == "bias":
        return None, affine(shape[1])[1], RELU, None
    return None, None, NONE, None


def backward_upstream(shape: tuple[int, ...], variant: str, dtype: torch.dtype) -> tuple:
    """grad, y, y_scale, y_shift, y_act, coef for an output of this shape."""
    grad = on_grid(*shape, dtype=dtype)
    if variant == "plain":
        return grad, None, None, None, NONE, None
    y, coef = on_grid(*shape, dtype=dtype), torch.randn(4, shape[1])
    if variant == "masked":  # arrives masked already: only the normalisation is left
        return grad, y, None, None, NONE, coef
    return grad, y, *affine(shape[1]), RELU6 if variant == "full" else SILU, coef


def backward_source(x: Tensor, variant: str) -> tuple:
    """x, x_scale, x_shift, x_act, x_mean."""
    if variant == "plain":
        return x, None, None, NONE, None
    return x, *affine(x.shape[1]), SILU if variant == "smooth" else RELU, torch.randn(x.shape[1]) / 4


FORWARD = ("plain", "prologue", "epilogue", "act_after_residual", "bias", "stats")
BACKWARD = ("plain", "full", "masked", "smooth")
NEEDS = ((True, True, True), (True, True, False), (True, False, False), (False, True, False))
