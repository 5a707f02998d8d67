"""What the tests of every model leave out of the Inception family: auxiliary classifiers, options, messages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fastcnn
from fastcnn.models import create_model
from fastcnn.models.googlenet import InceptionAux as GoogLeNetAux
from fastcnn.models.inception_v3 import InceptionAux
from fastcnn.nn import Branches, Fork, concat_branches
from fastcnn.training.objective import Objective
from tests.models.plain_inception import PlainAux
from tests.models.stock import HEAVY, LIGHT, Reference
from tests.models.test_models import _pair, _step
from tests.tolerances import relative_error

torchvision_aux = torchvision.models.inception.InceptionAux


def _family(references: dict[str, Reference]) -> list[str]:
    return [name for name in references if "inception" in name or "googlenet" in name]


def _check_eval_in_float64(reference: Reference, batch: int) -> None:
    ours, stock, x = _pair(reference, batch)
    with torch.no_grad():
        expected = stock.eval().double()(x.double())
        assert relative_error(ours.eval().double()(x.double()), expected) <= 1e-10
        assert relative_error(fastcnn.optimize(ours)(x.double()), expected) <= 1e-6  # which returns float32


@pytest.mark.parametrize("name", _family(LIGHT))
def test_eval_in_float64(name):
    _check_eval_in_float64(LIGHT[name], 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", _family(HEAVY))
def test_eval_and_a_training_step_of_the_heavy_ones_in_float64(name):
    torch.manual_seed(0)
    _check_eval_in_float64(HEAVY[name], 2)
    ours, stock, x = _pair(HEAVY[name], 2)
    actual, expected = _step(ours, x.double()), _step(stock, x.double())
    for key, oracle in expected.items():
        assert (actual[key] - oracle).norm() <= 1e-10 * max(1.0, oracle.norm().item()), key


@pytest.mark.parametrize(
    ("ours", "stock", "channels", "size"),
    [
        (lambda: InceptionAux(24, 10), lambda: torchvision_aux(24, 10), 24, 18),
        (lambda: GoogLeNetAux(24, 10, 0.0, True), lambda: PlainAux(24, 10, 0.0), 24, 15),
    ],
    ids=["inception_v3", "googlenet of the paper"],
)
def test_auxiliary_classifiers(ours, stock, channels, size):
    torch.manual_seed(0)
    ours, stock, x = ours().double(), stock().double(), torch.randn(3, channels, size, size, dtype=torch.float64)
    ours.load_state_dict(stock.state_dict(), strict=True)
    results = []
    for module in (ours, stock):
        y = module(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in module.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) <= 1e-12
    with pytest.raises(
        ValueError, match=r"x: got shape \[3, 24, 11, 11\], expected 1[47] .*pixels.* for the aux logits"
    ):
        ours(x[:, :, :11, :11])


def test_training_loss_weighs_the_auxiliary_classifiers():
    model = create_model("googlenet", num_classes=5, dropout=0.0, dropout_aux=0.0)
    x, labels = torch.randn(3, 3, 64, 64), torch.tensor([0, 4, 2])
    outputs = model(x)
    assert outputs._fields == torchvision.models.GoogLeNetOutputs._fields
    main, second, first = (F.cross_entropy(scores, labels) for scores in outputs)
    loss, scores = Objective(model)(x, labels)
    assert relative_error(loss, main + 0.3 * (first + second)) <= 1e-6
    assert relative_error(scores, outputs.logits) <= 1e-6
    assert create_model("inception_v3").auxiliary_weight == 0.4


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 75)])
def test_transform_input(name, size):
    options = {"num_classes": 7, "transform_input": True, "aux_logits": False}
    stock = getattr(torchvision.models, name)(init_weights=False, **options).eval()
    ours, x = create_model(name, **options).eval(), torch.randn(2, 3, size, size)
    ours.load_state_dict(stock.state_dict())
    with torch.no_grad():
        expected = stock.double()(x.double())
        assert relative_error(ours(x), expected) <= 1e-4
        assert relative_error(fastcnn.optimize(ours)(x), expected) <= 1e-4


def test_the_papers_googlenet_starts_with_a_signal():
    """torchvision's deviation of 0.01, without BatchNorm, leaves nothing of it."""
    model = create_model("googlenet", paper=True, aux_logits=False).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 64, 64))
    assert (logits[0] - logits[1]).norm() >= 1e-3 * logits[0].norm()


def test_branches_name_what_is_wrong():
    x = torch.randn(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"branches: got outputs of shapes \[2, 4, 8, 8\], \[2, 4, 4, 4\], expected"):
        Branches(one=nn.Identity(), two=nn.MaxPool2d(2))(x)
    with pytest.raises(ValueError, match="branches: got outputs of shapes none, expected"):
        concat_branches(x, [])
    doubled = concat_branches(x, [(nn.ReLU(), Fork([nn.Identity(), nn.Identity()]))])
    assert torch.equal(doubled, torch.cat([x.relu()] * 2, 1))
