"""Convolution, BatchNorm and activation: values, gradients and statistics of every order against torch in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn import backends, ops
from fastcnn.nn.fused import batch_norm
from fastcnn.ops import Affine, BatchNorm, conv_bn_act
from fastcnn.ops.conv_bn_act import ORDERS, narrowest_op
from fastcnn.ops.layout import conv_out_sizes
from tests.ops import cases
from tests.tolerances import TOLERANCE, assert_close, relative_error

ONE, NO = (1, 1), (0, 0)
# K, C, kernel, stride, padding, dilation, groups
GEOMETRIES = {
    "1x1": (8, 12, ONE, ONE, NO, ONE, 1),
    "1x1 / 2": (8, 16, ONE, (2, 2), NO, ONE, 1),
    "padded 1x1": (8, 12, ONE, ONE, ONE, ONE, 1),
    "3x3": (8, 12, (3, 3), ONE, ONE, ONE, 1),
    "3x3 / 2": (3, 16, (3, 3), (2, 2), ONE, ONE, 1),
    "3x3 dilated": (7, 9, (3, 3), ONE, (2, 2), (2, 2), 1),
    "5x5": (8, 12, (5, 5), ONE, (2, 2), ONE, 1),
    "7x7 / 2": (3, 16, (7, 7), (2, 2), (3, 3), ONE, 1),
    "11x11 / 4": (3, 8, (11, 11), (4, 4), (2, 2), ONE, 1),
    "1x7": (8, 12, (1, 7), ONE, (0, 3), ONE, 1),
    "7x1": (8, 12, (7, 1), (2, 1), (3, 0), ONE, 1),
    "grouped": (16, 24, (3, 3), ONE, ONE, ONE, 4),
    "grouped 1x1": (16, 8, ONE, ONE, NO, ONE, 2),
    "depthwise": (16, 16, (3, 3), (2, 2), ONE, ONE, 16),
    "depthwise x 2": (16, 32, (5, 5), ONE, (2, 2), ONE, 16),
}
NORMS = ("train", "train without affine", "frozen", "frozen without affine", "affine", "none")
ACTIVATIONS = {"none": lambda z: z, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}


class Call:
    """The arguments of one call, as float64 leaves; `ours` and `oracle` compute on copies in a dtype."""

    def __init__(
        self,
        geometry: str,
        order: str,
        norm: str,
        act: str = "silu",
        bias: bool = True,
        residual: bool = False,
        after: bool = False,
        size: tuple[int, int] = (12, 11),
    ) -> None:
        k, c, kernel, self.stride, self.padding, self.dilation, self.groups = GEOMETRIES[geometry]
        self.order, self.norm, self.act, self.after = order, norm, act, after
        channels = c if order == "conv_bn_act" else k
        out = conv_out_sizes(size, kernel, self.stride, self.padding, self.dilation)
        self.leaves = {"x": torch.randn(3, k, *size), "weight": cases.weight(c, k // self.groups, *kernel)}
        if bias:
            self.leaves["bias"] = torch.randn(c)
        if norm in ("train", "frozen", "affine"):
            self.leaves |= {"gamma": torch.rand(channels) + 0.5, "beta": torch.randn(channels)}
        if residual:
            self.leaves["residual"] = torch.randn(3, c, *out)
        self.leaves = {name: leaf.double() for name, leaf in self.leaves.items()}
        self.statistics = torch.randn(channels).double(), torch.rand(channels).double() + 0.5
        self.grad = torch.randn(3, c, *out).double()

    def run(self, function, dtype: torch.dtype) -> dict[str, Tensor]:
        """The value, every gradient, and the running statistics afterwards."""
        leaves = {name: leaf.to(dtype, copy=True).requires_grad_() for name, leaf in self.leaves.items()}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mean, var = (t.to(wide, copy=True) for t in self.statistics)
        y = function(leaves, mean, var)
        y.backward(self.grad.to(y.dtype))
        grads = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
        return {"value": y.detach(), **grads, "running mean": mean, "running var": var}

    def ours(self, leaves: dict[str, Tensor], mean: Tensor, var: Tensor) -> Tensor:
        gamma, beta = leaves.get("gamma"), leaves.get("beta")
        norm = None
        if self.norm == "affine":
            norm = Affine(gamma, beta)
        elif self.norm != "none":
            norm = BatchNorm(gamma, beta, mean, var, self.norm.startswith("train"), 0.3, 1e-3)
        return conv_bn_act(
            leaves["x"], leaves["weight"], leaves.get("bias"), norm, self.stride, self.padding, self.dilation,
            self.groups, self.act, self.order, leaves.get("residual"), self.after,
        )  # fmt: skip

    def _normalised(self, z: Tensor, leaves: dict[str, Tensor], mean: Tensor, var: Tensor) -> Tensor:
        gamma, beta = leaves.get("gamma"), leaves.get("beta")
        if self.norm == "none":
            return z
        if self.norm == "affine":
            return z * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)
        return F.batch_norm(z, mean, var, gamma, beta, self.norm.startswith("train"), 0.3, 1e-3)

    def oracle(self, leaves: dict[str, Tensor], mean: Tensor, var: Tensor) -> Tensor:
        act, residual = ACTIVATIONS[self.act], leaves.get("residual", 0)

        def convolve(a: Tensor) -> Tensor:
            where = (self.stride, self.padding, self.dilation, self.groups)
            return F.conv2d(a, leaves["weight"], leaves.get("bias"), *where)

        if self.order == "bn_act_conv":
            return convolve(act(self._normalised(leaves["x"], leaves, mean, var))) + residual
        z = self._normalised(convolve(leaves["x"]), leaves, mean, var)
        return act(z + residual) if self.after else act(z) + residual


def compare(call: Call, dtype: torch.dtype, tolerance: float | None = None) -> None:
    """Every result of ours in dtype against torch's in float64."""
    actual, expected = call.run(call.ours, dtype), call.run(call.oracle, torch.float64)
    without_gradient = call.order == "conv_bn_act" and call.norm.startswith("train")
    for name, oracle in expected.items():
        if name == "gradient of bias" and without_gradient:
            assert not actual[name].any()  # torch's is what rounding left of zero
            assert oracle.abs().max() < 1e-12
        else:
            error = relative_error(actual[name], oracle)
            assert error <= (tolerance or TOLERANCE[dtype]), f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_order_kernel_and_norm_in_float64(geometry, order, norm):
    compare(Call(geometry, order, norm), torch.float64)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_training_form_on_every_backend(geometry, order, preferred):
    compare(Call(geometry, order, "train"), torch.float32)


@pytest.mark.parametrize("norm", NORMS[1:])
@pytest.mark.parametrize("order", ORDERS)
def test_other_norms_on_every_backend(order, norm, preferred):
    compare(Call("3x3", order, norm), torch.float32)


@pytest.mark.parametrize("norm", ["train", "frozen", "none"])
@pytest.mark.parametrize("order", ORDERS)
def test_bfloat16(order, norm, preferred):
    compare(Call("1x1", order, norm), torch.bfloat16)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("order", "after"), [("conv_bn_act", False), ("conv_bn_act", True), ("bn_act_conv", False)])
def test_activations_and_residual(order, after, act):
    for norm, bias in itertools.product(("train", "frozen", "none"), (True, False)):
        call = Call("3x3", order, norm, act, bias, residual=True, after=after)
        if after and act in ("silu", "hardswish"):
            with pytest.raises(ValueError, match=f"act: got '{act}' after the residual, expected none, relu or relu6"):
                call.run(call.ours, torch.float64)
        else:
            compare(call, torch.float64)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", ["train", "frozen"])
def test_half_x_takes_float32_parameters(order, norm):
    call = Call("3x3", order, norm)
    x = call.leaves["x"].bfloat16()
    leaves = {**{name: t.float() for name, t in call.leaves.items()}, "x": x}
    y = call.ours(leaves, *(t.float() for t in call.statistics))
    assert y.dtype == torch.bfloat16
    expected = call.oracle({**call.leaves, "x": x.double()}, *(t.clone() for t in call.statistics))
    assert_close(y, expected, torch.bfloat16)


@pytest.mark.parametrize("order", ORDERS)
def test_without_gradients_the_norm_is_in_the_convolution(order):
    call, found = Call("3x3", order, "frozen"), []

    def observer(name, args, backend, function):
        found.append(name)
        return function(*args)

    leaves = {name: t.float() for name, t in call.leaves.items()}
    with torch.no_grad(), backends.observe(observer):
        call.ours(leaves, *(t.float() for t in call.statistics))
    assert found == ["conv2d_fwd"]


def test_a_mean_of_a_thousand_deviations(preferred):
    """Of the convolution's output and of the input: neither variance is the difference of two large numbers."""
    after = Call("1x1", "conv_bn_act", "train", "none")
    after.leaves["x"] = after.leaves["x"] + 1e3
    after.leaves["weight"] = torch.eye(12, 8).view(12, 8, 1, 1).double() + torch.eye(8, 12).flip(1).T.view(12, 8, 1, 1)
    before = Call("3x3", "bn_act_conv", "train")
    before.leaves["x"] = before.leaves["x"] + 1e3
    for call in (after, before):
        actual, expected = call.run(call.ours, torch.float32), call.run(call.oracle, torch.float64)
        stock = call.run(call.oracle, torch.float32)
        for name in ("running mean", "running var"):
            assert_close(actual[name], expected[name], torch.float32, name)
        for name in set(expected) - {"gradient of bias"}:
            # float32 holds 1000 + z to 3e-5: the value cannot be closer, the variance can.
            error, allowed = (relative_error(run[name], expected[name]) for run in (actual, stock))
            assert error <= max(2 * allowed, TOLERANCE[torch.float32]), name


@pytest.mark.parametrize("order", ORDERS)
def test_momentum_none_is_the_mean_over_batches(order):
    ours, stock = (nn.BatchNorm2d(8, momentum=None).double() for _ in range(2))
    weight, bias = torch.randn(8, 8, 3, 3).double(), torch.randn(8).double()
    for _ in range(3):
        x = torch.randn(2, 8, 6, 6).double()
        conv_bn_act(x, weight, bias, batch_norm(ours), order=order)
        stock(F.conv2d(x, weight, bias) if order == "conv_bn_act" else x)
    assert ours.num_batches_tracked == stock.num_batches_tracked == 3
    assert_close(ours.running_mean, stock.running_mean, torch.float64)
    assert_close(ours.running_var, stock.running_var, torch.float64)


def test_a_frozen_bias_gets_its_gradient_without_the_norm_learning():
    call = Call("3x3", "conv_bn_act", "frozen")
    gradients = []
    for function in (call.ours, call.oracle):
        leaves = {name: t.clone() for name, t in call.leaves.items()}
        leaves["bias"].requires_grad_()
        function(leaves, *(t.clone() for t in call.statistics)).backward(call.grad)
        gradients.append(leaves["bias"].grad)
    assert_close(*gradients, torch.float64)


def test_gradcheck():
    x, weight, bias, gamma, beta = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 5, 4), (6, 2, 3, 2), (6,), (6,), (6,))
    )
    mean, var = torch.randn(6).double(), torch.rand(6).double() + 0.5

    def function(x, weight, bias, gamma, beta):
        norm = BatchNorm(gamma, beta, mean, var, False, 0.1, 1e-5)
        return conv_bn_act(x, weight, bias, norm, (2, 1), 1, (1, 2), 2, "silu")

    with backends.force("reference"):
        assert torch.autograd.gradcheck(function, (x, weight, bias, gamma, beta))


def test_an_empty_batch():
    norm = BatchNorm(None, None, torch.zeros(4), torch.ones(4), False, 0.1, 1e-5)
    assert conv_bn_act(torch.randn(0, 8, 5, 5), torch.randn(4, 8, 3, 3), norm=norm, act="relu").shape == (0, 4, 3, 3)


@pytest.mark.parametrize(
    ("channels", "kernel", "padding", "groups", "op"),
    [
        (8, (1, 1), (0, 0), 1, "pointwise"),
        (8, (1, 1), (1, 1), 1, "conv2d"),
        (8, (1, 3), (0, 1), 1, "conv2d"),
        (8, (1, 1), (0, 0), 2, "conv2d"),
        (8, (3, 5), (1, 2), 8, "depthwise"),
        (8, (2, 2), (0, 0), 8, "conv2d"),
        (8, (33, 33), (16, 16), 8, "conv2d"),
    ],
)
def test_narrowest_op(channels, kernel, padding, groups, op):
    assert narrowest_op(channels, kernel, padding, groups) == op


X, W = torch.randn(2, 8, 9, 7), torch.randn(4, 8, 3, 3)


def norm_of(channels: int, training: bool = True, **changed: Tensor | None) -> BatchNorm:
    tensors = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), torch.ones(channels))
    return BatchNorm(**{**tensors, **changed}, training=training, momentum=0.1, eps=1e-5)


BAD = [
    ((X, W), {"order": "act_conv"}, ValueError, "order: got 'act_conv', expected one of conv_bn_act, bn_act_conv"),
    ((X, W), {"act": "gelu"}, ValueError, "act: got 'gelu', expected one of none, relu"),
    ((X, W), {"act": "gelu", "order": "bn_act_conv"}, ValueError, "act: got 'gelu', expected one of none, relu"),
    (
        (X, W),
        {"act_after_residual": True, "order": "bn_act_conv"},
        ValueError,
        "act_after_residual: got True with order",
    ),
    ((X, W), {"stride": 0}, ValueError, "stride: got 0, expected an integer of at least 1"),
    ((X, W), {"groups": 3}, ValueError, "groups: got 3, expected a divisor of x's 8 channels"),
    ((X.tolist(), W), {}, TypeError, "x: got list, expected a torch.Tensor"),
    ((X[0], W), {}, ValueError, r"x: got shape \[8, 9, 7\], expected 4 dimensions"),
    ((X, W.tolist()), {}, TypeError, "weight: got list, expected a torch.Tensor"),
    ((X, W.double()), {}, TypeError, "weight: got torch.float64, expected x's torch.float32"),
    ((X, W[:, :7]), {}, ValueError, r"weight: got shape \[4, 7, 3, 3\], expected \[C, 8, R, S\]"),
    ((X, torch.randn(4, 8, 10, 3)), {}, ValueError, "x: got 9 x 7 pixels before weight"),
    ((X, W, torch.randn(5)), {}, ValueError, r"bias: got shape \[5\], expected \[4\]"),
    ((X, W, torch.randn(5)), {"order": "bn_act_conv"}, ValueError, r"bias: got shape \[5\], expected \[4\]"),
    ((X, W, [0.0]), {}, TypeError, "bias: got list, expected a torch.Tensor"),
    ((X, W, None, norm_of(5)), {}, ValueError, r"norm.weight: got shape \[5\], expected \[4\]"),
    ((X, W, None, norm_of(4)), {"order": "bn_act_conv"}, ValueError, r"norm.weight: got shape \[4\], expected \[8\]"),
    ((X, W, None, Affine(None, torch.randn(5))), {}, ValueError, r"norm.shift: got shape \[5\], expected \[4\]"),
    ((X, W, None, norm_of(4, False, running_mean=None)), {}, ValueError, "norm.running_mean, running_var: got None"),
    ((X, W), {"residual": X}, ValueError, r"residual: got shape \[2, 8, 9, 7\], expected the output's \[2, 4, 7, 5\]"),
    ((X[:1, :, :3, :3], W, None, norm_of(4)), {}, ValueError, "batch statistics: got 1 value per channel"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD)
def test_bad_input_names_the_argument(args, options, error, message):
    with pytest.raises(error, match=message):
        ops.conv_bn_act(*args, **options)
