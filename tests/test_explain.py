"""fastcnn.explain tells which backend ran what, and what it costs."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from torch import nn

from fastcnn import backends
from fastcnn.benchmark import peaks
from fastcnn.explain import _model_of, explain
from fastcnn.models import create_model
from fastcnn.nn import Bottleneck, CapsuleLinear, DenseBlock, Dropout, PreActBlock
from fastcnn.ops.conv_chain import conv_chain
from fastcnn.ops.stages import Conv
from fastcnn.optimize import optimize


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "matrix_peak", lambda dtype, device="cpu": 1e9)
    monkeypatch.setattr(peaks, "copy_bandwidth", lambda device="cpu": 1e9)


class _Pointwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return conv_chain(x, [Conv("pointwise", (self.weight,))])


def _input() -> torch.Tensor:
    return torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)


def test_row_of_a_primitive() -> None:
    (row,) = explain(nn.Sequential(_Pointwise()), _input()).rows
    assert (row.layer, row.op, row.dtype) == ("0", "pointwise_fwd", "float32")
    assert row.shapes == "2×8×6×5 * 16×8×1×1 → 2×16×6×5"
    assert row.operations == 2 * 2 * 6 * 5 * 8 * 16
    assert row.bytes == 4 * (2 * 6 * 5 * (8 + 16) + 8 * 16)
    assert row.floor == max(row.operations, row.bytes) / 1e9


def test_rows_of_a_dense_block() -> None:
    model, x = DenseBlock(2, 8, 4, 4), torch.randn(2, 8, 6, 5)
    rows = {row.op: row for row in explain(model, x, backward=True).rows}
    pixels = 2 * 6 * 5
    assert rows["conv2d_into"].shapes == "2×16×6×5 * 4×16×3×3 → 2×4×6×5"
    assert rows["conv2d_into"].operations == 2 * pixels * 16 * 4 * 9
    last = rows["pointwise_bwd_into"]  # of the first layer, which comes last
    assert last.shapes == "2×16×6×5 * 16×8×1×1 → 2×8×6×5"
    assert last.operations == 2 * 2 * pixels * 8 * 16
    assert rows["widened"].shapes == "2×8×6×5 → 2×16×6×5"
    optimized = [row.op for row in explain(optimize(model.eval()), x).rows]
    assert optimized == ["widened"] + ["pointwise_fwd", "conv2d_into"] * 2


def test_backend_is_the_one_that_runs() -> None:
    x, model = _input(), _Pointwise()
    args = (x, model.weight, None, None, 0, None, None, 0, None, (1, 1), False)
    (row,) = explain(model, x).rows
    assert row.backend == backends.selected("pointwise_fwd", args)
    with backends.force("reference"):
        (row,) = explain(model, x).rows
    assert (row.backend, row.why) == ("reference", "")


def test_refusal_is_given_as_the_reason() -> None:
    (row,) = explain(_Pointwise().double(), _input().double()).rows
    assert row.backend == "reference"
    assert row.why.startswith("cpu: ")


def test_torch_ops_are_rows_too() -> None:
    model = nn.Sequential(_Pointwise(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    rows = explain(model, _input()).rows
    assert [(r.layer, r.backend) for r in rows if r.backend == "torch"] == [
        ("1", "torch"), ("2", "torch"), ("4", "torch"),
    ]  # fmt: skip
    assert rows[-1].op == "aten.addmm"
    assert rows[-1].operations == 2 * 2 * 16 * 4


def test_backward_rows_name_the_layer() -> None:
    rows = explain(nn.Sequential(_Pointwise()), _input(), backward=True).rows
    (row,) = [r for r in rows if r.op == "pointwise_bwd"]
    assert row.layer == "0 (backward)"


@pytest.mark.parametrize(
    ("layer", "primitive"), [(Bottleneck(8, 2), "residual_act_bwd"), (PreActBlock(8, 8), "channel_statistics")]
)
def test_every_primitive_of_a_residual_step_is_counted(layer: nn.Module, primitive: str) -> None:
    rows = [row for row in explain(layer, _input(), backward=True).rows if row.backend != "torch"]
    assert {primitive, "conv2d_bwd"} <= {row.op for row in rows}
    assert all(row.operations > 0 and row.bytes > 0 for row in rows)


@pytest.mark.parametrize(("name", "size"), [("resnet20", 32), ("xception", 299), ("resnet18", 224)])
def test_default_image_is_the_models_own(name: str, size: int) -> None:
    args = Namespace(model=name, batch=1, size=None, device="cpu", train=True)
    _, x = _model_of(args, torch.float32)
    assert x.shape == (1, 3, size, size)


def test_model_is_left_without_hooks_and_observers() -> None:
    model = _Pointwise()
    explain(model, _input())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not backends._observers


def test_neither_module_nor_name() -> None:
    with pytest.raises(TypeError, match="model: got int"):
        explain(3, _input())


def test_text_has_a_row_per_call() -> None:
    text = str(explain(_Pointwise(), _input()))
    assert "pointwise_fwd" in text
    assert "total" in text


def test_observer_sees_arguments_and_output() -> None:
    seen = []

    def observer(primitive, args, backend, function):
        output = function(*args)
        seen.append((primitive, args[0].shape, backend, output[0].shape))
        return output

    with backends.observe(observer):
        _Pointwise()(_input())
    _Pointwise()(_input())
    assert [(s[0], s[1], s[3]) for s in seen] == [("pointwise_fwd", (2, 8, 6, 5), (2, 16, 6, 5))]


def test_every_primitive_of_the_models_is_counted() -> None:
    rows = explain(optimize(create_model("xception").eval()), torch.randn(1, 3, 75, 75)).rows
    pools = [row for row in rows if row.op == "max_pool2d_fwd"]
    assert len(pools) == 4
    assert all(row.operations > 0 and row.bytes > 0 for row in rows)


def test_capsules_and_dropout():
    layers = nn.Sequential(CapsuleLinear(6, 4, 3, 5), nn.Flatten(), Dropout(0.5), Dropout(0.5, inplace=True))
    rows = {row.op: row for row in explain(layers, torch.randn(2, 6, 4), backward=True).rows}
    votes = 2 * 6 * 3 * 4 * 5
    assert rows["capsule_routing_fwd"].operations == 2 * votes + 5 * 2 * votes / 4
    assert rows["capsule_routing_bwd"].operations == 2 * rows["capsule_routing_fwd"].operations
    assert {"dropout_fwd", "dropout_inplace", "dropout_bwd"} <= set(rows)
