"""The stock models that fastcnn is compared with: torchvision's MobileNet-v2, timm's Xception."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

SIZES = {"mobilenet_v2": 224, "xception": 299}
# Multiply-adds of one image, and parameters, as the models' authors count them.
MACS = {"mobilenet_v2": 300.8e6, "xception": 8.357e9}
SOURCES = {"mobilenet_v2": "torchvision", "xception": "timm"}


class MissingPackage(ImportError):
    """An optional package is not installed."""


def require(package: str, extra: str = "demo") -> None:
    """Raises MissingPackage with the command that installs a package."""
    import importlib

    try:
        importlib.import_module(package)
    except ImportError as error:
        raise MissingPackage(f"{package} is not installed ({error}); run: pip install 'fastcnn[{extra}]'") from None


def build(name: str) -> nn.Module:
    """The stock model, newly initialised by torch's global generator."""
    require(SOURCES[name])
    if name == "mobilenet_v2":
        import torchvision

        return torchvision.models.mobilenet_v2()
    import timm

    return timm.create_model("legacy_xception", pretrained=False)


def seeded(name: str, seed: int = 0) -> nn.Module:
    """The stock model with random weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(name)


@contextlib.contextmanager
def _cumulative_statistics(model: nn.Module) -> Iterator[None]:
    """Within the block every BatchNorm averages its statistics over all batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    try:
        yield
    finally:
        for m, momentum in zip(norms, momenta):
            m.momentum = momentum


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """Gives BatchNorm these batches' statistics, so that random weights give varied outputs; in eval mode.

    Without them a random network's output shrinks or grows from layer to layer, until all images look alike.
    """
    with _cumulative_statistics(model):
        model.train()
        for batch in batches:
            model(batch)
    return model.eval()


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Loads a .pth or .safetensors file of the stock model's own keys.

    Raises:
        ValueError: the file cannot be read as weights, or its keys or shapes are not the model's.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            require("safetensors")
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("state_dict", state), strict=True)
    except MissingPackage:
        raise
    except Exception as error:  # torch and safetensors raise a dozen kinds; the file is at fault in each
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not weights of {type(model).__name__}: {reason}") from None
    return model
