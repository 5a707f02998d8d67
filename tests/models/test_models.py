"""The models against torchvision and timm: keys, counts, outputs, one training step, memory."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fastcnn
from fastcnn.benchmark.memory import saved_bytes
from fastcnn.models import create_model, list_models
from tests.parity import farther_than_stock, stock_errors
from tests.tolerances import relative_error

STOCK = {
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 3_504_872, 96),
    "xception": (lambda **kw: timm.create_model("legacy_xception", **kw), 22_855_952, 107),
}


@pytest.fixture(scope="module", params=STOCK)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A fastcnn model and the stock one, same weights, with running statistics of real forward passes."""
    make, count, size = STOCK[request.param]
    torch.manual_seed(0)
    stock, x = make(), torch.randn(4, 3, size, size)
    with torch.no_grad():
        for _ in range(3):
            stock(x)
    ours = create_model(request.param)
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert sum(p.numel() for p in ours.parameters()) == count
    return ours, stock, x


def test_registry():
    assert set(STOCK) <= set(list_models())
    with pytest.raises(ValueError, match="name: got 'mobilenet_v9', expected one of"):
        create_model("mobilenet_v9")
    assert create_model("mobilenet_v2", num_classes=7)(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_eval_outputs(pair):
    ours, stock, x = pair
    ours, oracle = copy.deepcopy(ours).eval(), copy.deepcopy(stock).eval().double()
    with torch.no_grad():
        expected = oracle(x.double())
        assert relative_error(ours(x), expected) <= 1e-4
        assert relative_error(fastcnn.optimize(ours)(x), expected) <= 1e-4
        y = fastcnn.optimize(ours, dtype=torch.bfloat16)(x)
        assert y.dtype == torch.float32
        assert relative_error(y, expected) <= 3e-2


def _step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).train().to(x.dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss = F.cross_entropy(model(x), torch.arange(len(x)))
    loss.backward()
    results = {f"gradient of {k}": p.grad for k, p in model.named_parameters()}
    results |= {k: b.clone() for k, b in model.named_buffers() if b.is_floating_point()}
    return {"loss": loss.detach(), **results}


def test_training_step_is_as_close_to_float64_as_torchs(pair):
    ours, stock, x = pair

    def step(image, layout):
        return _step(copy.deepcopy(stock).to(memory_format=layout), image)

    expected = _step(stock, x.double())
    assert not farther_than_stock(_step(ours, x), expected, stock_errors(step, x, expected))


def test_saved_activations():
    model = create_model("mobilenet_v2")
    x = torch.randn(2, 3, 224, 224)
    assert saved_bytes(model, lambda: model(x)) / 2 / 1e6 <= 40


def test_compiles_without_a_graph_break():
    model = create_model("mobilenet_v2").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert relative_error(compiled(x), expected) <= 1e-5


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(tmp_path, suffix):
    stock, path = torchvision.models.mobilenet_v2(), tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(stock.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(stock.state_dict(), path)
    for source in (path, path.as_uri()) if suffix == ".pth" else (path,):
        model = create_model("mobilenet_v2", weights=source)
        assert torch.equal(model.classifier[1].weight, stock.classifier[1].weight)


def _broken(state: dict, how: str) -> dict:
    if how == "missing":
        state.pop("features.0.0.weight")
    elif how == "unexpected":
        state["features.99.weight"] = torch.zeros(1)
    elif how == "shape":
        state["classifier.1.weight"] = torch.zeros(10, 1280)
    elif how == "nan":
        state["features.3.conv.0.0.weight"][0] = float("nan")
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"features.0.0.weight.*missing key"),
        ("unexpected", r"features.99.weight.*unexpected key"),
        ("shape", r"classifier.1.weight has shape \[10, 1280\], expected \[1000, 1280\]"),
        ("nan", r"features.3.conv.0.0.weight contains NaN"),
    ],
)
def test_bad_weights_name_file_and_key(tmp_path, how, message):
    path = tmp_path / "bad.pth"
    torch.save(_broken(torchvision.models.mobilenet_v2().state_dict(), how), path)
    with pytest.raises(ValueError, match=rf"bad\.pth.*{message}"):
        create_model("mobilenet_v2", weights=path)


def test_damaged_and_absent_files(tmp_path):
    path = tmp_path / "damaged.pth"
    path.write_bytes(b"no weights here")
    with pytest.raises(ValueError, match=r"damaged\.pth"):
        create_model("mobilenet_v2", weights=path)
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        create_model("mobilenet_v2", weights=tmp_path / "absent.pth")
