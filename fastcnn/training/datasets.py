"""MNIST and CIFAR through torchvision: fetched, read whole as uint8, and which file is at fault if that fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn.benchmark.stock import require


class Split(NamedTuple):
    """Half of a data set: images [N, C, H, W], uint8, and labels [N], int64."""

    images: Tensor
    labels: Tensor


def _dataset(name: str) -> type:
    """torchvision's class of a data set."""
    require("torchvision")
    from torchvision import datasets

    return {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def _files(name: str, root: str | os.PathLike[str]) -> dict[Path, str | None]:
    """The files of a data set in torchvision's layout and their MD5, where torchvision knows it."""
    dataset = _dataset(name)
    if name == "mnist":
        folder = Path(root) / "MNIST" / "raw"
        return {folder / archive.removesuffix(".gz"): None for archive, _ in dataset.resources}
    folder = Path(root) / dataset.base_folder
    listed = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
    return {folder / file: md5 for file, md5 in listed}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def fetch(name: str, root: str | os.PathLike[str], download: bool) -> None:
    """Makes sure that a data set's files are under `root`.

    Raises:
        FileNotFoundError: a file is missing and must not be downloaded.
        OSError: it cannot be downloaded.
    """
    missing = [path for path in _files(name, root) if not path.is_file()]
    if not missing:
        return
    if not download:
        raise FileNotFoundError(f"data_dir: no file {str(missing[0])!r} of {name}, and downloading is off")
    try:
        _dataset(name)(root, download=True)
    except Exception as error:  # torchvision raises RuntimeError, URLError and what its archives raise
        raise OSError(f"data_dir: cannot download {name} into {str(root)!r}: {_one_line(error)}") from error


def _reason(path: Path, md5: str | None) -> str | None:
    """Why a file cannot be read, or None if it can."""
    from torchvision.datasets import mnist, utils

    if md5 is not None:
        return None if utils.check_integrity(path, md5) else "its MD5 is not the data set's"
    try:
        (mnist.read_image_file if "images" in path.name else mnist.read_label_file)(str(path))
    except Exception as error:  # a damaged header fails in a dozen ways
        return _one_line(error)
    return None


def _read_split(name: str, root: str | os.PathLike[str], train: bool) -> Split:
    data = _dataset(name)(root, train=train, download=False)
    images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
    if len(images) != len(labels):
        raise ValueError(f"data_dir: {name} in {str(root)!r} has {len(images)} images but {len(labels)} labels")
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return Split(images, labels)


def _check(split: Split, name: str, root: str | os.PathLike[str], num_classes: int) -> None:
    if not len(split.labels):
        raise ValueError(f"data_dir: {name} in {str(root)!r} holds no images")
    wrong = ((split.labels < 0) | (split.labels >= num_classes)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise ValueError(
            f"data_dir: {name} in {str(root)!r}: label {int(split.labels[index])} of image {index}, "
            f"expected 0 to {num_classes - 1}"
        )


def read(name: str, root: str | os.PathLike[str]) -> tuple[Split, Split, int]:
    """The training set, the test set and the number of classes.

    Raises:
        ValueError: a damaged file, which the message names, or a label out of range.
        OSError: a file cannot be opened.
    """
    try:
        splits = [_read_split(name, root, train) for train in (True, False)]
    except Exception as error:
        for path, md5 in _files(name, root).items():
            reason = _reason(path, md5)
            if reason:
                raise ValueError(
                    f"data_dir: {str(path)!r} is damaged ({reason}); delete it to download it again"
                ) from error
        raise
    num_classes = 100 if name == "cifar100" else 10
    for split in splits:
        _check(split, name, root, num_classes)
    return splits[0], splits[1], num_classes
