"""The models against torchvision and timm: keys, counts, outputs, one training step, memory."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torchvision
from torch import nn

import fastcnn
from fastcnn.benchmark.memory import saved_bytes
from fastcnn.models import CIFARResNet, CIFARWideResNet, ResNet, create_model, image_size, input_format, list_models
from fastcnn.nn import Bottleneck
from fastcnn.training.objective import Objective
from tests.models.stock import ALL, HEAVY, LIGHT, Reference
from tests.nn.pairs import randomise
from tests.parity import farther_than_stock, stock_errors
from tests.tolerances import relative_error

SMALL = {
    "densenet_bc40_12",
    "densenet_bc100_12",
    "densenet_bc190_40",
    "densenet_bc250_24",
    "resnet20",
    "resnet56",
    "plain20",
    "plain56",
    "wrn28_10",
    "lenet5",
}  # 32 pixels; without capsule networks


@pytest.fixture(scope="module", params=LIGHT)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A fastcnn model and the stock one, same weights, with running statistics of real forward passes."""
    torch.manual_seed(0)
    return _pair(LIGHT[request.param], 4)


def _pair(reference: Reference, batch: int) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    stock, x = reference.stock(), torch.randn(batch, reference.channels, reference.size, reference.size)
    with torch.no_grad():
        for _ in range(3):
            stock(x)
    ours = reference.ours()
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours, stock, x


def test_registry():
    assert set(list_models()) == {name for name in ALL if " " not in name} - {"wrn16_2"}
    with pytest.raises(ValueError, match="name: got 'mobilenet_v9', expected one of"):
        create_model("mobilenet_v9")
    with pytest.raises(ValueError, match=r"name: got 'resnet51', expected one of .*; did you mean 'resnet5[06]'\?"):
        image_size("resnet51")
    assert create_model("mobilenet_v2", num_classes=7)(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert {name for name in list_models() if image_size(name) == 32} == SMALL


@pytest.mark.parametrize("name", ALL)
def test_keys_and_counts(name):
    reference = ALL[name]
    with torch.device("meta"):
        ours, stock = reference.ours(), reference.stock()
    assert sum(p.numel() for p in ours.parameters()) == reference.parameters
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [(k, v.shape) for k, v in stock.state_dict().items()]


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet20", "wrn16_2", "vgg11 features", "googlenet", "inception_v3 without aux"]
)
def test_random_initialisation_is_the_references(name):
    states = []
    for make in LIGHT[name][:2]:
        torch.manual_seed(3)
        states.append(make().state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def _check_eval(ours: nn.Module, stock: nn.Module, x: torch.Tensor, deep: bool = False) -> None:
    ours, oracle = copy.deepcopy(ours).eval(), copy.deepcopy(stock).eval().double()
    with torch.no_grad():
        expected = oracle(x.double())
        assert relative_error(ours(x), expected) <= 1e-4
        assert relative_error(fastcnn.optimize(ours)(x), expected) <= 1e-4
        y = fastcnn.optimize(ours, dtype=torch.bfloat16)(x)
        assert y.dtype == torch.float32
        allowed = 3e-2
        if deep:
            with torch.autocast("cpu", torch.bfloat16):  # 150 layers round often: 4e-2 in torch's own bf16
                allowed = max(allowed, relative_error(stock.eval()(x), expected))
        assert relative_error(y, expected) <= allowed


def test_eval_outputs(pair):
    _check_eval(*pair)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
def test_eval_outputs_of_the_heavy_ones(name):
    _check_eval(*_pair(HEAVY[name], 2), deep=True)


def _step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).train().to(x.dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss, _ = Objective(model)(x, torch.arange(len(x)))
    loss.backward()
    results = {f"gradient of {k}": p.grad for k, p in model.named_parameters()}
    results |= {k: b.clone() for k, b in model.named_buffers() if b.is_floating_point()}
    return {"loss": loss.detach(), **results}


def test_training_step_equals_the_references_in_float64(pair):
    ours, stock, x = pair
    actual, expected = _step(ours, x.double()), _step(stock, x.double())
    for key, oracle in expected.items():
        # A bias before a BatchNorm has no gradient: the reference's is rounding, ours is zero.
        assert (actual[key] - oracle).norm() <= 1e-10 * max(1.0, oracle.norm().item()), key


def test_training_step_is_as_close_to_float64_as_torchs(pair):
    ours, stock, x = pair

    def step(image, layout):
        return _step(copy.deepcopy(stock).to(memory_format=layout), image)

    expected = _step(stock, x.double())
    assert not farther_than_stock(_step(ours, x), expected, stock_errors(step, x, expected))


@pytest.mark.parametrize(
    ("name", "megabytes"), [("mobilenet_v2", 30), ("resnet50", 48), ("resnet18", 14), ("googlenet", 36)]
)
def test_saved_activations(name, megabytes):
    """Per image; 78.3, 86.1, 22.2 and 48.3 in torch."""
    model = create_model(name)
    x = torch.randn(2, 3, 224, 224)
    assert saved_bytes(model, lambda: model(x)) / 2 / 1e6 <= megabytes


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "lenet5", "capsnet"])
def test_compiles_without_a_graph_break(name):
    model, form = create_model(name).eval(), input_format(name)
    x = torch.randn(1, form.channels, *(min(64, form.size),) * 2)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert relative_error(compiled(x), expected) <= 1e-5


def test_resnet_takes_torchvisions_options():
    options = {
        "num_classes": 7, "zero_init_residual": True, "groups": 2, "width_per_group": 16,
        "replace_stride_with_dilation": [False, True, True], "norm_layer": partial(nn.BatchNorm2d, eps=1e-3),
    }  # fmt: skip
    layers, x = (1, 2, 1, 2), torch.randn(2, 3, 48, 40)
    stock = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, list(layers), **options)
    ours = ResNet(Bottleneck, layers, **options)
    assert not ours.layer2[1].bn3.weight.any()
    ours.load_state_dict(randomise(stock).state_dict())
    _check_eval(ours, stock, x)
    with pytest.raises(
        ValueError, match=r"replace_stride_with_dilation: got \[True\], expected None or three booleans"
    ):
        create_model("resnet50", replace_stride_with_dilation=[True])
    with pytest.raises(ValueError, match="groups: got 2, expected 1, the only one that a BasicBlock has"):
        create_model("resnet18", groups=2)


def test_cifar_models_name_a_bad_option():
    for model, message in (
        (lambda: create_model("resnet20", shortcut="C"), "shortcut: got 'C', expected one of A, B, none"),
        (lambda: CIFARResNet(21), r"depth: got 21, expected 6n \+ 2"),
        (lambda: CIFARWideResNet(27, 10), r"depth: got 27, expected 6n \+ 4"),
        (lambda: create_model("wrn28_10", dropout=2.0), "dropout: got 2.0, expected a probability below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model()


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
