"""Something small to train: a network and data sets in torchvision's layouts, written here."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcnn.training import TrainConfig

# What every test's run has in common: two epochs of three steps.
QUICK = {"data": "mnist", "epochs": 2, "batch": 16, "limit_steps": 3, "lr": 0.05, "device": "cpu", "download": False}


class Tiny(nn.Module):
    """A convolution, a BatchNorm, a dropout and a classifier: one of each thing that a checkpoint must keep."""

    def __init__(self, num_classes: int, size: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, size, 5, stride=4)
        self.norm = nn.BatchNorm2d(size)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.norm(self.conv(x)).relu().mean((2, 3))))


def tiny(num_classes: int = 1000, weights: None = None) -> Tiny:
    return Tiny(num_classes)


def tinier(num_classes: int = 1000, weights: None = None) -> Tiny:
    return Tiny(num_classes, size=4)


def exploding(num_classes: int = 1000, weights: None = None) -> Tiny:
    model = Tiny(num_classes)
    with torch.no_grad():
        model.classifier.bias[0] = torch.inf
    return model


def linear(num_classes: int = 1000, weights: None = None) -> nn.Module:
    """Without a BatchNorm, to which it matters how a batch is shared."""
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, num_classes))


def without_dropout(num_classes: int = 1000, weights: None = None) -> Tiny:
    """A BatchNorm, and nothing that draws random numbers."""
    model = Tiny(num_classes)
    model.dropout = nn.Identity()
    return model


BUILDERS = (tiny, tinier, exploding, linear, without_dropout)


def write_mnist(root: Path, train: int = 64, test: int = 20) -> Path:
    """Noise as MNIST's files; each class has its brightness, which makes them learnable."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", train), ("t10k", test)):
        labels = torch.arange(count, dtype=torch.uint8) % 10
        images = torch.randint(0, 20, (count, 28, 28), dtype=torch.uint8, generator=generator)
        images += 25 * labels.view(-1, 1, 1)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.numpy().tobytes())
    return root


def write_folder(root: Path, per_class: int = 4) -> Path:
    """Images of two classes, in train/ and val/, as PNG and JPEG of different shapes."""
    from PIL import Image

    for split in ("train", "val"):
        for name, colour in (("apple", (200, 30, 30)), ("pear", (60, 180, 40))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                image = Image.new("RGB", (40 + 5 * i, 48), colour)
                image.putpixel((i, i), (0, 0, 255))
                image.save(folder / f"{i}.{('png', 'jpg')[i % 2]}")
    return root


def config(root: Path, **changes: object) -> TrainConfig:
    """A quick run on the data in root/data, which writes into root/run."""
    return TrainConfig(**{"model": "tiny", "data_dir": root / "data", "output": root / "run", **QUICK, **changes})
