"""A data set in memory as uint8, whose batches are cut, flipped and normalised as whole tensors.

On two cores that is far faster than an image at a time, and on a GPU the set stays there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.training.config import TrainConfig
from fastcnn.training.data import Batches, channels_of, pixel_statistics
from fastcnn.training.datasets import Split
from fastcnn.training.distributed import Group
from fastcnn.training.order import Order

SHIFTS = {"mnist": 2, "cifar10": 4, "cifar100": 4}  # pixels that a crop is moved by at most, on each axis
LARGEST_CROP = 32


def crop_size(size: int, image: int, shift: int) -> int:
    """Pixels along an axis of the crops that give a model images of a size: that size where a crop can have it.

    That is where the frame around the image, or the margin left out, is as wide on one side as on the other, and no
    shift leaves the image.
    """
    return size if image - 2 * shift <= size <= LARGEST_CROP and (size - image) % 2 == 0 else LARGEST_CROP


class Crops:
    """Every crop of some pixels along an axis from a set of padded images.

    Args:
        split: images [N, C, H, H], and labels.
        size: pixels along an axis of a crop, from H - 2 shift on, even where H is.
        shift: pixels that a crop is moved by at most, on each axis; what lies outside of the image is black.
        device: where they stay.
    """

    def __init__(self, split: Split, size: int, shift: int, device: torch.device) -> None:
        padding = (size - split.images.shape[2]) // 2 + shift
        padded = F.pad(split.images.to(device), (padding,) * 4)
        # A view [N, C, offsets, offsets, size, size]: no crop exists before it is indexed.
        self._crops = padded.unfold(2, size, 1).unfold(3, size, 1)
        self._labels = split.labels.to(device)

    def __len__(self) -> int:
        return len(self._labels)

    def centred(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images as they are, with a black frame or without their margin where a crop has another size."""
        middle = self._crops.shape[2] // 2
        return self._crops[indices, :, middle, middle], self._labels[indices]

    def random(self, indices: Tensor, numbers: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
        """A crop of each image, mirrored or not, as its random number says."""
        offsets = self._crops.shape[2]
        top, left, side = numbers % offsets, numbers // offsets % offsets, numbers // offsets**2 % 2
        images = self._crops[indices, :, top, left]
        if flip:
            images = torch.where(side.bool().view(-1, 1, 1, 1), images.flip(3), images)
        return images, self._labels[indices]


class MemoryData:
    """MNIST or CIFAR: crops moved by up to two (MNIST) or four pixels, for CIFAR also mirror images.

    A crop has the `image_size` of the run, if that is even and from 24 to 32: MNIST's grey images of 28 x 28 get a black
    frame in a crop of 32 x 32. Other sizes are scaled from such crops, bilinearly. Grey images are repeated to the
    channels that the model takes.

    Raises:
        ValueError: a batch larger than the training set, or that does not divide among the processes; a model that takes
            fewer channels than the images have.
    """

    def __init__(self, config: TrainConfig, group: Group, train: Split, test: Split, num_classes: int) -> None:
        self.num_classes = num_classes
        self.order = Order(len(train.labels), config.batch, config.seed, config.limit_steps, group.rank, group.size)
        shift = SHIFTS[config.data]
        self._crop = crop_size(config.size, train.images.shape[2], shift)
        self._train, self._test = (Crops(split, self._crop, shift, group.device) for split in (train, test))
        self._device, self._size, self._channels = group.device, config.size, channels_of(config)
        self._flip = config.data != "mnist"
        self._mean, self._std = pixel_statistics(config, group.device)

    def train(self, epoch: int) -> Batches:
        """An epoch's augmented batches, this process's part of each."""
        for indices, numbers in self.order.epoch(epoch):
            images, labels = self._train.random(indices.to(self._device), numbers.to(self._device), self._flip)
            yield self._finished(images), labels

    def test(self) -> Batches:
        """The test set's images, this process's part of them."""
        for indices in self.order.test_batches(len(self._test)):
            images, labels = self._test.centred(indices.to(self._device))
            yield self._finished(images), labels

    def _finished(self, images: Tensor) -> Tensor:
        """uint8 crops [N, C, S, S] as a model takes them."""
        images = (images.float() - self._mean) / self._std
        if self._size != self._crop:
            images = F.interpolate(images, self._size, mode="bilinear", antialias=True)
        return images.expand(-1, self._channels, -1, -1).contiguous(memory_format=torch.channels_last)
