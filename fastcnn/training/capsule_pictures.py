"""What a capsule network sees in an image: reconstructions, and what each dimension of a capsule does."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fastcnn.training.checkpoint import write_atomically
from fastcnn.training.data import Batches

DIGITS = 20  # images in the picture of reconstructions
SEEN = 100  # images among which every class is looked for
TWEAKS = 11  # values of a dimension, from -0.25 to 0.25, as in the paper's figure 4
GAP = 2  # white pixels between tiles


def _first(test: Batches, count: int) -> tuple[Tensor, Tensor]:
    """At least `count` images of a test set and their labels, from as many batches as that takes; fewer if it ends."""
    images, labels = [], []
    for batch, answers in test:
        images.append(batch)
        labels.append(answers)
        if sum(map(len, labels)) >= count:
            break
    return torch.cat(images), torch.cat(labels)


def _sheet(tiles: Tensor) -> Tensor:
    """Tiles [rows, columns, C, H, W] in [0, 1] as one picture of 8 bits, [height, width] or [height, width, 3]."""
    framed = nn.functional.pad(tiles.float().cpu(), (0, GAP, 0, GAP), value=1.0)
    rows, columns, channels, height, width = framed.shape
    picture = framed.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    return (255 * picture.clamp(0, 1)).round().to(torch.uint8).squeeze(2)


def _write(picture: Tensor, path: Path) -> None:
    from PIL import Image

    image = Image.fromarray(picture.numpy())
    write_atomically(path, lambda file: image.save(file, format="png", optimize=True))


def _reconstructions(model: nn.Module, images: Tensor) -> Tensor:
    """Two pairs of rows: images above what the decoder makes of the longest capsule, tiles [4, DIGITS / 2, C, H, W]."""
    made = model.reconstruct(model.capsules(images)).view_as(images)
    return torch.stack((images, made), 1).unflatten(0, (2, -1)).transpose(1, 2).flatten(0, 1)


def _dimensions(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The first image of each class, with one coordinate of its capsule moved: tiles [dim, TWEAKS, C, H, W] side by side.

    A class is a block of TWEAKS columns; a coordinate of the capsule is a row.
    """
    blocks = []
    for label in labels.unique():
        capsules = model.capsules(images[labels == label][:1])
        dim = capsules.shape[2]
        tweaks = torch.linspace(-0.25, 0.25, TWEAKS, device=capsules.device)
        moved = capsules.expand(dim * TWEAKS, -1, -1).clone().view(dim, TWEAKS, *capsules.shape[1:])
        moved[:, :, label] += torch.eye(dim, device=capsules.device)[:, None] * tweaks[:, None]
        made = model.reconstruct(moved.flatten(0, 1), label.expand(dim * TWEAKS))
        blocks.append(made.view(dim, TWEAKS, *images.shape[1:]))
    half = (len(blocks) + 1) // 2  # two rows of blocks
    blocks += [torch.ones_like(blocks[0])] * (2 * half - len(blocks))
    return torch.cat([torch.cat(blocks[:half], 1), torch.cat(blocks[half:], 1)])


@torch.no_grad()
def draw_capsules(model: nn.Module, test: Batches, folder: Path) -> None:
    """Writes reconstructions.png and dimensions.png, from the first images of a test set.

    reconstructions.png: rows of images, each above what the decoder makes of its longest capsule. dimensions.png: per
    class a block whose rows are the coordinates of its capsule, moved by -0.25 to 0.25 from left to right.

    Args:
        model: has `capsules` and `reconstruct` as `fastcnn.models.CapsNet`, and is in eval mode afterwards.
        test: batches of images in [0, 1].
        folder: where the pictures go.

    Source: Sabour, Frosst & Hinton 2017 (arXiv 1710.09829), figures 3 and 4.

    Raises:
        ImportError: Pillow is not installed.
    """
    model.eval()
    images, labels = _first(test, SEEN)
    _write(_sheet(_reconstructions(model, images[: min(DIGITS, len(images) // 2 * 2)])), folder / "reconstructions.png")
    _write(_sheet(_dimensions(model, images, labels)), folder / "dimensions.png")
