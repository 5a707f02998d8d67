"""Real MNIST, where it is at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastcnn.training import TrainConfig, train
from fastcnn.training.data import open_data
from fastcnn.training.distributed import process_group

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not (DATA / "MNIST" / "raw").is_dir(), reason="no MNIST in ../shared/data")


def test_normalised_pixels_have_mean_zero_and_deviation_one() -> None:
    config = TrainConfig("mobilenet_v2", data="mnist", data_dir=DATA, batch=10000, device="cpu", download=False)
    with process_group("cpu") as group:
        data = open_data(config, group)
    (images, labels), *rest = data.test()
    assert not rest
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    digits = images[:, 0, 2:-2, 2:-2]
    assert digits.mean().abs() < 0.02
    assert (digits.std() - 1).abs() < 0.02


@pytest.mark.slow
def test_resnet20_reaches_99_per_cent(tmp_path: Path) -> None:
    result = train(TrainConfig("resnet20", data="mnist", data_dir=DATA, output=tmp_path, epochs=2, download=False))
    assert result.history[-1].test_accuracy >= 0.99
