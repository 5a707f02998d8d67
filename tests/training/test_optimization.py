"""The schedule, who gets weight decay, the average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcnn.training import TrainConfig
from fastcnn.training.optimization import Ema, exponential_learning_rate, learning_rate, make_optimizer, make_schedule
from tests.training.tiny import Tiny


def test_learning_rate_rises_to_the_peak_and_falls_to_nearly_zero() -> None:
    rates = [learning_rate(step, 100, 10, 0.4) for step in range(100)]
    assert rates[10] == pytest.approx(0.4)
    assert rates[0] == pytest.approx(0.4 / 11)
    assert rates[55] == pytest.approx(0.2)
    assert 0 < rates[99] < 1e-3
    assert all(a < b for a, b in zip(rates[:10], rates[1:11]))
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert learning_rate(0, 5, 0, 0.4) == 0.4
    assert learning_rate(4, 5, 5, 0.4) < 0.4


def test_biases_and_norms_do_not_decay() -> None:
    model = Tiny(10)
    model.classifier.weight.requires_grad_(False)
    optimizer = make_optimizer(model, TrainConfig("tiny", nesterov=True, weight_decay=1e-3))
    decayed, spared = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(model.conv.weight)]
    assert decayed["weight_decay"] == 1e-3
    expected = {id(p) for p in (model.conv.bias, model.norm.weight, model.norm.bias, model.classifier.bias)}
    assert {id(p) for p in spared["params"]} == expected
    assert spared["weight_decay"] == 0
    assert decayed["nesterov"]


def test_capsule_networks_train_as_their_paper_says() -> None:
    config = TrainConfig("capsnet", data="mnist", epochs=20)
    optimizer, rate = make_optimizer(Tiny(10), config), make_schedule(config, 500)
    assert isinstance(optimizer, torch.optim.Adam)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0]
    assert rate(0) == 1e-3
    assert rate(2000) == pytest.approx(0.96e-3)
    assert rate(5000) == pytest.approx(0.96**2.5 * 1e-3)
    assert exponential_learning_rate(3, 4, 1.0, 0.5, 10) == pytest.approx(0.8)
    assert exponential_learning_rate(14, 4, 1.0, 0.5, 10) == pytest.approx(0.5)


def test_what_is_asked_for_goes_before_the_models_recipe() -> None:
    assert TrainConfig("capsnet", optimizer="sgd").recipe == ("sgd", 0.1, 5e-4, "cosine")
    assert TrainConfig("capsnet", schedule="cosine", lr=0.01).recipe == ("adam", 0.01, 0.0, "cosine")
    assert TrainConfig("tiny", optimizer="adam", weight_decay=0.1).recipe == ("adam", 1e-3, 0.1, "exponential")
    assert TrainConfig("capsnet").warmup == 0
    assert TrainConfig("capsnet", schedule="cosine").warmup == 1


def test_average_follows_weights_and_statistics() -> None:
    model = nn.BatchNorm2d(2)
    ema = Ema(model, 0.5)
    values = torch.tensor([1.0, 1.0])
    for step in range(12):
        with torch.no_grad():
            model.weight.fill_(float(step))
            model.running_mean.fill_(-float(step))
            model.num_batches_tracked.fill_(step)
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        values = decay * values + (1 - decay) * step
    torch.testing.assert_close(ema.module.weight, values)
    assert ema.module.running_mean[0] < -9
    assert ema.module.num_batches_tracked == 11
    assert not ema.module.training
    assert not ema.module.weight.requires_grad
