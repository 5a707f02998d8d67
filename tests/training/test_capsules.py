"""A capsule network under `fastcnn train`: its own loss, its recipe, its pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from fastcnn.models import CapsNet, registry
from fastcnn.nn import CapsuleLinear
from fastcnn.training import Interrupted, Reporter, train
from fastcnn.training.capsule_pictures import draw_capsules
from fastcnn.training.objective import Objective
from tests.training.tiny import config


def tiny_capsnet(num_classes: int = 10, weights: None = None) -> CapsNet:
    """Of 9 primary capsules of one type, whose first convolution is narrow."""
    model = CapsNet(num_classes, types=1)
    model.conv1, model.primary.conv = torch.nn.Conv2d(1, 4, 9), torch.nn.Conv2d(4, 8, 9, 2)
    model.digit = CapsuleLinear(36, 8, num_classes, 16)
    return model


@pytest.fixture(autouse=True)
def tiny_name() -> None:
    registry.register(28, channels=1, normalised=False)(tiny_capsnet)


def test_it_learns_and_draws_what_it_saw(root: Path) -> None:
    result = train(config(root, model="tiny_capsnet", epochs=6, limit_steps=None, lr=2e-2, ema=0.9))
    losses = [epoch.train_loss for epoch in result.history]
    assert losses[-1] < 0.95 * losses[0]
    assert result.ema is not None
    # 20 test images in two batches: 2 x 2 rows of 10 images of 28 pixels, each with a gap of 2.
    assert imread(root / "run" / "reconstructions.png").shape == (4 * 30, 10 * 30)
    # Two rows of five classes; 16 coordinates, 11 values.
    assert imread(root / "run" / "dimensions.png").shape[:2] == (2 * 16 * 30, 5 * 11 * 30)


def test_pictures_show_the_images_and_their_reconstructions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images, labels = tiny_capsnet(), torch.rand(3, 1, 28, 28), torch.tensor([4, 1, 4])
    draw_capsules(model, iter(list(zip(images.split(1), labels.split(1)))), tmp_path)  # batches of one
    assert not model.training
    sheet = torch.from_numpy(imread(tmp_path / "reconstructions.png"))
    with torch.no_grad():
        capsules = model.capsules(images)
        made = model.reconstruct(capsules)
        for i, (row, tile) in enumerate(((0, images[0]), (1, made[0]), (2, images[1]), (3, made[1]))):
            drawn = sheet[30 * row : 30 * row + 28, :28]
            torch.testing.assert_close(drawn, tile[0], atol=1 / 250, rtol=0, msg=str(i))
        blocks = torch.from_numpy(imread(tmp_path / "dimensions.png"))
        # Class 1 above class 4; the middle column moves nothing, the first one coordinate 3 by -0.25.
        for top, image, label in ((0, 1, 1), (16 * 30, 0, 4)):
            moved = capsules[image : image + 1].clone()
            moved[:, label, 3] -= 0.25
            tile = model.reconstruct(moved, torch.tensor([label]))[0, 0]
            corner = blocks[top + 90 : top + 118, :28]
            torch.testing.assert_close(corner, tile, atol=1 / 250, rtol=0)
            middle = blocks[top + 90 : top + 118, 150:178]
            still = model.reconstruct(capsules[image : image + 1], torch.tensor([label]))[0, 0]
            torch.testing.assert_close(middle, still, atol=1 / 250, rtol=0)


def test_resumed_run_ends_as_an_uninterrupted_one(root: Path) -> None:
    class StopInSecond(Reporter):
        def step(self, report) -> None:
            if report.epoch == 2:
                raise KeyboardInterrupt

    settings = {"model": "tiny_capsnet", "optimizer": "adam", "lr": None}
    with pytest.raises(Interrupted):
        train(config(root, **settings), StopInSecond())
    resumed = train(config(root, **settings, resume=True))
    whole = train(config(root, **settings, output=root / "whole"))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_an_exponential_schedule_may_go_on_for_more_epochs(root: Path) -> None:
    settings = {"model": "tiny_capsnet", "optimizer": "adam", "lr": None}
    train(config(root, **settings, epochs=1))
    longer = train(config(root, **settings, epochs=2, resume=True))
    whole = train(config(root, **settings, epochs=2, output=root / "whole"))
    assert [epoch.train_loss for epoch in longer.history] == [epoch.train_loss for epoch in whole.history]
    train(config(root, model="tiny", epochs=1, output=root / "cosine"))
    with pytest.raises(ValueError, match=r"epochs: got 2, but the checkpoint .* has 1"):
        train(config(root, model="tiny", epochs=2, output=root / "cosine", resume=True))


def test_its_loss_has_no_label_smoothing(root: Path) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing: got 0.1, expected 0: CapsNet trains on a loss of its own"):
        train(config(root, model="tiny_capsnet", label_smoothing=0.1))


def test_cross_entropy_is_smoothed_in_training_only() -> None:
    x, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    objective = Objective(torch.nn.Identity(), label_smoothing=0.2)
    smooth, scores = objective(x, labels)
    assert torch.equal(scores, x)
    torch.testing.assert_close(smooth, torch.nn.functional.cross_entropy(x, labels, label_smoothing=0.2))
    torch.testing.assert_close(objective.eval()(x, labels)[0], torch.nn.functional.cross_entropy(x, labels))


def test_without_a_decoder_nothing_is_reconstructed() -> None:
    model = CapsNet(image_size=17, types=1, decoder=False)
    assert not any(key.startswith("decoder") for key in model.state_dict())
    with pytest.raises(ValueError, match="decoder: got False when the model was made, expected True to reconstruct"):
        model.reconstruct(torch.zeros(1, 10, 16))
    with pytest.raises(ValueError, match="image_size: got 16, expected at least 17 pixels"):
        CapsNet(image_size=16)
