"""The data that a run trains on: batches on the device, from memory or from a folder of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fastcnn.models import input_format
from fastcnn.training.config import TrainConfig
from fastcnn.training.distributed import Group
from fastcnn.training.order import Order

Batches = Iterator[tuple[Tensor, Tensor]]

# Mean and standard deviation of the training set's pixels, per channel, in [0, 1].
NORMALISATION = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Data(Protocol):
    """A training set and a test set. Batches are images [N, C, S, S], float32, channels_last, and labels [N], int64."""

    num_classes: int
    order: Order

    def train(self, epoch: int) -> Batches:
        """An epoch's augmented batches, this process's part of each."""
        ...

    def test(self) -> Batches:
        """The test set's images, this process's part of them."""
        ...


def channels_of(config: TrainConfig) -> int:
    """The channels of the images that the model takes.

    Raises:
        ValueError: fewer than the data set has.
    """
    channels, colours = input_format(config.model).channels, len(NORMALISATION[config.data][0])
    if channels < colours:
        raise ValueError(f"data: {config.data} has {colours} channels, but {config.model} takes {channels}")
    return channels


def pixel_statistics(config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """What is subtracted from 8-bit pixels and what the rest is divided by, each [1, C, 1, 1]."""
    mean, std = NORMALISATION[config.data] if input_format(config.model).normalised else ((0.0,), (1.0,))
    return tuple(255 * torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))


def open_data(config: TrainConfig, group: Group) -> Data:
    """The data set that a configuration names; what is missing is downloaded by the first process, unless it must not.

    Raises:
        ValueError: a damaged file, a label out of range, a batch larger than the set.
        OSError: data that is not there and is not or cannot be downloaded.
        ImportError: torchvision is not installed.
    """
    if config.data == "imagefolder":
        from fastcnn.training.folder import FolderData

        return FolderData(config, group)
    from fastcnn.training.datasets import fetch, read
    from fastcnn.training.memory import MemoryData

    if group.is_main:
        fetch(config.data, config.data_dir, config.download)
    group.barrier()
    return MemoryData(config, group, *read(config.data, config.data_dir))
