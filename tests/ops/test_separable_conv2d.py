"""The public separable convolution: values and gradients against the plain torch composition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastcnn import backends, ops
from tests.ops import cases
from tests.tolerances import assert_close

ACTS = {"none": lambda z: z, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}


def _leaves(order: str) -> dict[str, torch.Tensor]:
    k, hidden, c = 20, 20 if order == "depthwise_first" else 28, 24
    out = c if order == "depthwise_first" else hidden
    return {
        "x": torch.randn(2, k, 11, 9),
        "dw": cases.weight(hidden, 1, 3, 3),
        "pw": cases.weight(c if order == "depthwise_first" else hidden, k, 1, 1),
        "mid_gamma": torch.rand(hidden) + 0.5,
        "mid_beta": torch.randn(hidden) / 4,
        "out_gamma": torch.rand(out) + 0.5,
        "out_beta": torch.randn(out) / 4,
        "residual": torch.randn(2, out, 6, 5),
    }


def _plain(t: dict, order: str, act: str, training: bool, statistics: list) -> torch.Tensor:
    def normalise(z, name, i):
        return F.batch_norm(z, *statistics[i], t[f"{name}_gamma"], t[f"{name}_beta"], training, 0.1, 1e-5)

    def depthwise(z):
        return F.conv2d(z, t["dw"], None, 2, 1, 1, z.shape[1])

    def pointwise(z):
        return F.conv2d(z, t["pw"])

    first, second = (depthwise, pointwise) if order == "depthwise_first" else (pointwise, depthwise)
    z = ACTS[act](normalise(first(F.relu(t["x"])), "mid", 0))
    return ACTS[act](normalise(second(z), "out", 1)) + t["residual"]


def _fused(t: dict, order: str, act: str, training: bool, statistics: list) -> torch.Tensor:
    def norm(name, i):
        return ops.BatchNorm(t[f"{name}_gamma"], t[f"{name}_beta"], *statistics[i], training, 0.1, 1e-5)

    return ops.separable_conv2d(
        t["x"], t["dw"], t["pw"], stride=2, padding=1, in_act="relu", mid_norm=norm("mid", 0), mid_act=act,
        out_norm=norm("out", 1), out_act=act, residual=t["residual"], order=order,
    )  # fmt: skip


def _run(function, leaves: dict, dtype: torch.dtype, *args) -> tuple[torch.Tensor, dict, list]:
    t = {name: v.detach().to(dtype).requires_grad_() for name, v in leaves.items()}
    sizes = [leaves[f"{n}_gamma"].numel() for n in ("mid", "out")]
    statistics = [[torch.zeros(s, dtype=dtype), torch.ones(s, dtype=dtype)] for s in sizes]
    y = function(t, *args, statistics)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(dtype))
    return y, t, statistics


@pytest.mark.parametrize("training", [True, False], ids=["batch statistics", "running statistics"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("order", ["depthwise_first", "pointwise_first"])
def test_values_gradients_and_statistics(order, act, training, preferred):
    torch.manual_seed(0)
    leaves = _leaves(order)
    y, t, statistics = _run(_fused, leaves, torch.float32, order, act, training)
    expected, oracle, oracle_statistics = _run(_plain, leaves, torch.float64, order, act, training)
    assert_close(y, expected, torch.float32)
    for name in leaves:
        if training and act == "none" and name in ("mid_beta", "mid_gamma"):
            continue  # the batch normalisation that follows takes any shift and scale out: a gradient of rounding only
        assert_close(t[name].grad, oracle[name].grad, torch.float32, f"gradient of {name}")
    for got, want in zip(statistics, oracle_statistics, strict=True):
        for a, e in zip(got, want, strict=True):
            assert_close(a, e, torch.float32, "running statistics")


@pytest.mark.parametrize("order", ["depthwise_first", "pointwise_first"])
def test_inference_takes_the_fused_primitive(order):
    leaves, ran = _leaves(order), []

    def observer(name, args, which, function):
        ran.append(name)
        return function(*args)

    sizes = [leaves[f"{n}_gamma"].numel() for n in ("mid", "out")]
    statistics = [[torch.zeros(size), torch.ones(size)] for size in sizes]
    with torch.no_grad(), backends.observe(observer):
        y = _fused(leaves, order, "relu6", False, statistics)
    assert ran == ["separable_fwd" if order == "depthwise_first" else "inverted_residual_fwd"]
    assert_close(y, _plain({k: v.double() for k, v in leaves.items()}, order, "relu6", False,
                           [[v.double() for v in s] for s in statistics]), torch.float32)  # fmt: skip


def test_scale_and_shift_have_gradients(preferred):
    leaves = _leaves("depthwise_first")
    fused = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    plain = {k: v.double().requires_grad_() for k, v in leaves.items()}
    names = ("mid_gamma", "mid_beta", "out_gamma", "out_beta")

    y = ops.separable_conv2d(
        fused["x"], fused["dw"], fused["pw"], stride=2, padding=1, mid_act="silu",
        **dict(zip(("mid_scale", "mid_shift", "out_scale", "out_shift"), (fused[n] for n in names), strict=True)),
    )  # fmt: skip
    c = lambda v: v.view(1, -1, 1, 1)  # noqa: E731
    z = F.silu(F.conv2d(plain["x"], plain["dw"], None, 2, 1, 1, 20) * c(plain["mid_gamma"]) + c(plain["mid_beta"]))
    expected = F.conv2d(z, plain["pw"]) * c(plain["out_gamma"]) + c(plain["out_beta"])
    assert_close(y, expected, torch.float32)
    grad = torch.randn(y.shape)
    y.backward(grad)
    expected.backward(grad.double())
    for name in ("x", "dw", "pw", *names):
        assert_close(fused[name].grad, plain[name].grad, torch.float32, name)


def test_gradcheck():
    torch.manual_seed(0)
    x, dw = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(3, 1, 3, 3, dtype=torch.float64)
    pw = torch.randn(4, 3, 1, 1, dtype=torch.float64)
    gamma, beta = torch.rand(3, dtype=torch.float64) + 0.5, torch.randn(3, dtype=torch.float64)

    def function(x, dw, pw, gamma, beta):
        norm = ops.BatchNorm(gamma, beta, None, None, True, 0.1, 1e-3)
        return ops.separable_conv2d(x, dw, pw, padding=1, in_act="silu", mid_norm=norm, mid_act="silu")

    with backends.force("reference"):
        assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (x, dw, pw, gamma, beta)])


X, DW, PW = torch.randn(2, 8, 9, 7), torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)
BAD = [
    ((X, DW, PW), {"order": "both"}, "order: got 'both'"),
    ((X, DW, PW), {"in_act": "tanh"}, "tanh"),
    ((X, DW, torch.randn(4, 9, 1, 1)), {}, r"pw_weight: got shape \[4, 9, 1, 1\]"),
    ((X, DW, torch.randn(4, 8, 3, 3)), {}, "pw_weight"),
    ((X[0], DW, PW), {}, "x: got"),
    ((X.int(), DW, PW), {}, "x: got torch.int32"),
    ((X, DW, PW), {"residual": torch.randn(2, 4, 9, 7)}, "residual: got shape"),
    ((X, DW.to("meta"), PW), {}, "dw_weight: got .*meta"),
    ((X[:, :0], DW, PW), {}, "got shape"),
]


@pytest.mark.parametrize(("args", "options", "message"), BAD)
def test_bad_input(args, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ops.separable_conv2d(*args, **options)


def test_a_forced_backend_that_cannot_run_is_an_error():
    with backends.force("cuda"), pytest.raises(backends.BackendError, match=r"depthwise_fwd|separable_fwd"):
        ops.separable_conv2d(X, DW, PW)
    with pytest.raises(ValueError, match="backend: got 'gpu', expected one of"), backends.force("gpu"):
        pass
