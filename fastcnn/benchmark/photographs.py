"""Real images for the demo: the photographs that ship inside scikit-image, or given files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastcnn.benchmark.stock import require

# Those in the wheel: nothing is downloaded.
SAMPLES = (
    "astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg",
    "hubble_deep_field.jpg", "ihc.png",
)  # fmt: skip
# As the models' weights were trained: torchvision's MobileNet-v2, timm's Xception.
NORMALISATION = {
    "mobilenet_v2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "xception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
CROP = 0.875  # the share of the shorter side that the square crop keeps


def sample_paths() -> list[Path]:
    """The sample photographs that this scikit-image ships.

    Raises:
        MissingPackage: scikit-image is not installed.
        ValueError: it ships none of them.
    """
    require("skimage")
    import skimage.data

    directory = Path(skimage.data.__file__).parent
    found = [directory / name for name in SAMPLES if (directory / name).exists()]
    if not found:
        raise ValueError(f"no sample photographs in {directory}; give paths of images instead")
    return found


def load(path: str | Path, name: str, size: int) -> Tensor:
    """The centre of a photograph as a model takes it: [3, size, size], normalised.

    Raises:
        ValueError: the file is not there or is not an image; the message names it.
    """
    require("PIL")
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        reason = "not an image" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        raise ValueError(f"{path}: cannot be read as an image: {reason}") from None
    scale = size / CROP / min(image.size)
    image = image.resize([max(size, round(scale * side)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    pixels = np.array(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMALISATION[name])
    return (torch.from_numpy(pixels).permute(2, 0, 1) - mean) / std


def batch(paths: Sequence[str | Path], name: str, size: int) -> Tensor:
    """All photographs as one batch [N, 3, size, size]."""
    return torch.stack([load(path, name, size) for path in paths])
