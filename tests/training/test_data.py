"""Data: the order and who gets which part of it, crops, and files that are missing, damaged or wrong."""

from __future__ import annotations

import multiprocessing
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastcnn.training import datasets
from fastcnn.training.data import open_data
from fastcnn.training.datasets import Split
from fastcnn.training.distributed import Group
from fastcnn.training.memory import Crops, MemoryData, crop_size
from fastcnn.training.order import Order
from tests.training.tiny import config, write_folder

CPU = torch.device("cpu")
ONE = Group(CPU)


def collected(batches: object) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


# --- order ---


def test_an_epoch_shows_each_image_once_and_no_epoch_as_another() -> None:
    order = Order(images=20, batch=4, seed=1)
    first, second = (torch.cat([indices for indices, _ in order.epoch(e)]) for e in (1, 2))
    assert first.sort().values.tolist() == list(range(20))
    assert not torch.equal(first, second)
    again = torch.cat([indices for indices, _ in Order(20, 4, seed=1).epoch(1)])
    assert torch.equal(first, again)
    other = torch.cat([indices for indices, _ in Order(20, 4, seed=2).epoch(1)])
    assert not torch.equal(first, other)


def test_processes_share_the_same_batches() -> None:
    whole = Order(18, 4, seed=0).epoch(3)
    parts = [Order(18, 4, seed=0, rank=rank, size=2).epoch(3) for rank in (0, 1)]
    assert len(whole) == 4
    for step, batch in enumerate(whole):
        for whole_part, *process_parts in zip(batch, parts[0][step], parts[1][step]):
            assert torch.equal(whole_part, torch.cat(process_parts))
    tests = [batch for rank in (0, 1) for batch in Order(18, 4, 0, rank=rank, size=2).test_batches(11)]
    assert torch.cat(tests).sort().values.tolist() == list(range(11))


def test_limit_and_batches_that_do_not_fit() -> None:
    assert Order(20, 4, 0, limit_steps=3).steps == 3
    assert Order(20, 4, 0, limit_steps=9).steps == 5
    with pytest.raises(ValueError, match="batch: got 21, expected at most the 20 images"):
        Order(20, 21, 0)
    with pytest.raises(ValueError, match="batch: got 5, expected a multiple of the 2 processes"):
        Order(20, 5, 0, size=2)


# --- in memory ---


def test_crops_are_windows_of_the_padded_image() -> None:
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    crops = Crops(Split(images, torch.arange(6)), 32, 4, CPU)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    indices = torch.tensor([5, 0, 2, 2])
    for number in (0, 1, 8, 9, 40, 80):
        out, labels = crops.random(indices, torch.full((4,), number), flip=False)
        top, left = number % 9, number // 9 % 9
        assert torch.equal(out, padded[indices, :, top : top + 32, left : left + 32])
        assert torch.equal(labels, indices)
        mirrored, _ = crops.random(indices, torch.full((4,), number + 81), flip=True)
        assert torch.equal(mirrored, out.flip(3))
    assert torch.equal(crops.centred(indices)[0], images[indices])


@pytest.mark.parametrize(
    ("size", "image", "shift", "crop"),
    [(32, 28, 2, 32), (28, 28, 2, 28), (24, 28, 2, 24), (22, 28, 2, 32), (29, 28, 2, 32), (40, 28, 2, 32),
     (32, 32, 4, 32), (24, 32, 4, 24), (16, 32, 4, 32)],
)  # fmt: skip
def test_crops_have_the_models_size_where_they_can(size: int, image: int, shift: int, crop: int) -> None:
    assert crop_size(size, image, shift) == crop


def test_crops_of_24_are_any_part_of_an_image() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    crops, indices = Crops(Split(images, torch.arange(2)), 24, 4, CPU), torch.tensor([1])
    seen = [crops.random(indices, torch.tensor([number]), flip=False)[0] for number in range(81)]
    for number, out in enumerate(seen):
        top, left = number % 9, number // 9
        assert torch.equal(out, images[indices, :, top : top + 24, left : left + 24])
    assert torch.equal(crops.centred(indices)[0], images[indices, :, 4:28, 4:28])


def test_a_model_with_a_decoder_gets_grey_pixels_between_0_and_1(root: Path) -> None:
    data = open_data(config(root, model="capsnet"), ONE)
    raw = datasets.read("mnist", root / "data")
    images, _ = next(data.test())
    assert images.shape == (16, 1, 28, 28)
    torch.testing.assert_close(images, raw[1].images[:16] / 255)
    padded = torch.nn.functional.pad(raw[0].images, (2, 2, 2, 2)) / 255
    for (indices, numbers), (images, labels) in zip(data.order.epoch(1), data.train(1)):
        for index, number, image in zip(indices.tolist(), numbers.tolist(), images):
            top, left = number % 5, number // 5 % 5
            torch.testing.assert_close(image, padded[index, :, top : top + 28, left : left + 28])
        assert torch.equal(labels, raw[0].labels[indices])


def test_colours_are_not_shown_to_a_model_that_takes_one_channel() -> None:
    split = Split(torch.zeros(32, 3, 32, 32, dtype=torch.uint8), torch.zeros(32, dtype=torch.int64))
    with pytest.raises(ValueError, match="data: cifar10 has 3 channels, but lenet5 takes 1"):
        MemoryData(config(Path(), data="cifar10", model="lenet5"), ONE, split, split, 10)


@pytest.mark.parametrize("size", [32, 40, 16])
def test_mnist_gets_a_frame_and_three_channels(root: Path, size: int) -> None:
    data = open_data(config(root, image_size=size), ONE)
    images, labels = next(data.test())
    assert images.shape == (16, 3, size, size)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images[:, 0], images[:, 2])
    assert labels.tolist() == [i % 10 for i in range(16)]
    if size == 32:
        black = (0 - 0.1307) / 0.3081
        torch.testing.assert_close(images[:, :, :2], torch.full((16, 3, 2, 32), black))
        raw = datasets.read("mnist", root / "data")[1].images[:16]
        torch.testing.assert_close(images[:, :1, 2:-2, 2:-2], (raw / 255 - 0.1307) / 0.3081)


def test_normalised_training_images_have_mean_zero_and_deviation_one() -> None:
    mean, std = torch.tensor((0.4914, 0.4822, 0.4465)), torch.tensor((0.2470, 0.2435, 0.2616))
    noise = torch.randn(32, 3, 32, 32).clamp(-1.5, 1.5)
    pixels = 255 * (noise * std.view(3, 1, 1) + mean.view(3, 1, 1)).clamp(0, 1)
    split = Split(pixels.round().to(torch.uint8), torch.zeros(32, dtype=torch.int64))
    data = MemoryData(config(Path(), data="cifar10"), ONE, split, split, 10)
    images, _ = collected(data.test())
    torch.testing.assert_close(images, noise, atol=0.02, rtol=0)


def test_missing_data_is_not_downloaded_when_that_is_off(tmp_path: Path) -> None:
    for name, file in (("mnist", "train-images-idx3-ubyte"), ("cifar10", "data_batch_1"), ("cifar100", "train")):
        with pytest.raises(FileNotFoundError, match=f"{file}.* and downloading is off"):
            open_data(config(tmp_path, data=name), ONE)


def test_failed_download_names_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(datasets._dataset("mnist"), "download", fail)
    with pytest.raises(OSError, match=r"cannot download mnist into .*: no route to host"):
        open_data(config(tmp_path, download=True), ONE)


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_damaged_mnist_file_is_named(root: Path, file: str, content: bytes | None) -> None:
    path = root / "data" / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[:-5] if content is None else content)
    with pytest.raises(ValueError, match=f"{file}' is damaged"):
        open_data(config(root), ONE)


def test_damaged_cifar_file_is_named(tmp_path: Path) -> None:
    for path in datasets._files("cifar10", tmp_path / "data"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not a batch")
    with pytest.raises(ValueError, match=r"data_batch_1' is damaged .its MD5"):
        open_data(config(tmp_path, data="cifar10"), ONE)


def test_label_out_of_range(root: Path) -> None:
    path = root / "data" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(ValueError, match="label 10 of image 19, expected 0 to 9"):
        open_data(config(root), ONE)
    path.write_bytes(struct.pack(">II", 0x801, 3) + bytes(3))
    with pytest.raises(ValueError, match="20 images but 3 labels"):
        open_data(config(root), ONE)


# --- a folder of images ---


def folder_config(root: Path, **changes: object):
    return config(root, **{"data": "imagefolder", "batch": 4, "image_size": 24, "workers": 0, **changes})


def test_a_folder_gives_the_same_batches_with_any_number_of_workers(tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    alone, helped = (open_data(folder_config(tmp_path, workers=workers), ONE) for workers in (0, 2))
    for epoch in (1, 2):
        images, labels = collected(alone.train(epoch))
        assert images.shape == (8, 3, 24, 24)
        assert sorted(labels.tolist()) == [0] * 4 + [1] * 4
        for ours, theirs in zip((images, labels), collected(helped.train(epoch))):
            assert torch.equal(ours, theirs)
    images, labels = collected(alone.test())
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert next(alone.test())[0].is_contiguous(memory_format=torch.channels_last)
    apple = torch.tensor([(200 / 255 - 0.485) / 0.229, (30 / 255 - 0.456) / 0.224, (30 / 255 - 0.406) / 0.225])
    torch.testing.assert_close(images[0, :, 12, 12], apple)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"no picture", None])
def test_damaged_image_is_named(tmp_path: Path, workers: int, content: bytes | None) -> None:
    write_folder(tmp_path / "data")
    path = tmp_path / "data" / "train" / "pear" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-150] if content is None else content)
    data = open_data(folder_config(tmp_path, workers=workers), ONE)
    with pytest.raises(ValueError, match=r"pear/1.jpg: cannot be read as an image") as error:
        list(data.train(1))
    assert "Traceback" not in str(error.value)
    assert not multiprocessing.active_children()  # a worker that outlived its loader would hold up the exit


def test_folders_that_are_missing_or_disagree(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*train'; imagefolder expects train/ and val/"):
        open_data(folder_config(tmp_path), ONE)
    write_folder(tmp_path / "data")
    (tmp_path / "data" / "val" / "pear").rename(tmp_path / "data" / "val" / "quince")
    with pytest.raises(ValueError, match="class 'pear' is in train/ but not val/"):
        open_data(folder_config(tmp_path), ONE)
