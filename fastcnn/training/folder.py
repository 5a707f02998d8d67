"""A folder of images through torchvision's ImageFolder: decoded by worker processes, normalised by the batch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastcnn.benchmark.stock import require
from fastcnn.training.config import TrainConfig
from fastcnn.training.data import Batches, channels_of, pixel_statistics
from fastcnn.training.distributed import Group
from fastcnn.training.order import Order

RESIZE = 256 / 224  # the shorter side before the centre crop, over the crop's


class _Images(Dataset):
    """An ImageFolder whose items are asked for by (index, random number).

    An unreadable file is returned as an error instead of raised: a DataLoader buries what a worker raises under the
    worker's traceback.
    """

    def __init__(self, root: Path, transform: Callable) -> None:
        from torchvision.datasets import ImageFolder

        if not root.is_dir():
            raise FileNotFoundError(
                f"data_dir: no folder {str(root)!r}; imagefolder expects train/ and val/, each with a folder per class"
            )
        self.folder = ImageFolder(str(root))
        self._transform = transform

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | ValueError:
        from PIL import Image, UnidentifiedImageError
        from torchvision.datasets.folder import pil_loader

        index, number = key
        path, label = self.folder.samples[index]
        try:
            image = pil_loader(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
            return ValueError(f"{path}: cannot be read as an image: {reason}")
        # torchvision's transforms draw from the global generator, whose state must not tell one worker from another.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(number)
            return self._transform(image), label


def _collate(items: Sequence[tuple[Tensor, int] | ValueError]) -> tuple[Tensor, Tensor] | ValueError:
    for item in items:
        if isinstance(item, ValueError):
            return item
    images, labels = zip(*items)
    return torch.stack(images), torch.tensor(labels)


def _start_worker(_worker: int) -> None:
    """Makes a worker quiet about signals, which a terminal or a service manager sends to every process of a run.

    Ctrl-C is the main process's affair. SIGTERM ends the worker, as multiprocessing expects of it, but as a success:
    the DataLoader would report anything else as a crash while the main process is stopping.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda _signal, _frame: os._exit(0))


def _transforms(size: int) -> tuple[Callable, Callable]:
    """What training and testing do to an image: to a uint8 tensor [3, size, size]."""
    from torchvision.transforms import v2

    train = (v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip())
    test = (v2.Resize(round(size * RESIZE), antialias=True), v2.CenterCrop(size))
    return v2.Compose([*train, v2.PILToTensor()]), v2.Compose([*test, v2.PILToTensor()])


def _check_classes(train: Sequence[str], test: Sequence[str], root: str | os.PathLike[str]) -> None:
    different = sorted(set(train) ^ set(test))
    if different:
        where = "train/ but not val/" if different[0] in train else "val/ but not train/"
        raise ValueError(f"data_dir: class {different[0]!r} is in {where} of {str(root)!r}, expected it in both")


class FolderData:
    """Images in data_dir/train/CLASS/ and data_dir/val/CLASS/, in any format that Pillow reads.

    Training takes a random part of each image, of 8 to 100 % of its area, scaled to `image_size` (224 by default) and
    mirrored half of the time; testing takes the centre after scaling the shorter side to 256/224 of that.

    Raises:
        FileNotFoundError: no such folders, or a class without images.
        ValueError: classes that differ, a batch larger than the training set; while iterating: a file, named in the
            message, that is no image.
        ImportError: torchvision is not installed.
    """

    def __init__(self, config: TrainConfig, group: Group) -> None:
        require("torchvision")
        channels_of(config)
        root = Path(config.data_dir)
        for_train, for_test = _transforms(config.size)
        self._train, self._test = _Images(root / "train", for_train), _Images(root / "val", for_test)
        _check_classes(self._train.folder.classes, self._test.folder.classes, root)
        self.num_classes = len(self._train.folder.classes)
        self.order = Order(len(self._train), config.batch, config.seed, config.limit_steps, group.rank, group.size)
        self._device, self._workers = group.device, config.workers
        self._mean, self._std = pixel_statistics(config, group.device)

    def train(self, epoch: int) -> Batches:
        """An epoch's augmented batches, this process's part of each."""
        keys = [list(zip(i.tolist(), numbers.tolist())) for i, numbers in self.order.epoch(epoch)]
        return self._batches(self._train, keys)

    def test(self) -> Batches:
        """The validation images, this process's part of them."""
        keys = [[(i, 0) for i in indices.tolist()] for indices in self.order.test_batches(len(self._test))]
        return self._batches(self._test, keys)

    def _batches(self, images: _Images, keys: list[list[tuple[int, int]]]) -> Batches:
        loader = DataLoader(
            images,
            batch_sampler=keys,
            num_workers=self._workers,
            collate_fn=_collate,
            worker_init_fn=_start_worker,
            pin_memory=self._device.type == "cuda",
        )
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            pixels, labels = (tensor.to(self._device, non_blocking=True) for tensor in batch)
            pixels = (pixels.float() - self._mean) / self._std
            yield pixels.contiguous(memory_format=torch.channels_last), labels
