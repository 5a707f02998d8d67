"""The stock models that fastcnn is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcnn.benchmark import plain


class Stock(NamedTuple):
    """Where a stock model comes from; multiply-adds of one image as its authors count them."""

    package: str
    name: str  # in the package
    macs: float
    size: int = 224
    classes: int = 1000
    channels: int = 3
    batch: int = 8  # of a training step
    options: Mapping[str, object] = MappingProxyType({})  # of the stock model


MODELS = {
    "mobilenet_v2": Stock("torchvision", "mobilenet_v2", 300.8e6),
    "xception": Stock("timm", "legacy_xception", 8.357e9, 299),
    "resnet50": Stock("torchvision", "resnet50", 4.089e9),
    "resnet18": Stock("torchvision", "resnet18", 1.814e9),
    "vgg16_bn": Stock("torchvision", "vgg16_bn", 15.470e9),
    "wrn28_10": Stock("pytorchcv", "wrn28_10_cifar10", 5.243e9, 32, 10),
    "densenet121": Stock("torchvision", "densenet121", 2.834e9),
    "googlenet": Stock("torchvision", "googlenet", 1.498e9, options={"init_weights": False}),
    "inception_v3": Stock("torchvision", "inception_v3", 5.713e9, 299, options={"init_weights": False}),
    "lenet5": Stock("fastcnn.benchmark.plain", "PlainLeNet5", 0.417e6, 32, 10, 1, 128),
    "capsnet": Stock("fastcnn.benchmark.plain", "PlainCapsNet", 202e6, 28, 10, 1, 100),
}


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
    package, key, *_, options = MODELS[name]
    if package == plain.__name__:
        return getattr(plain, key)()
    require(package, "bench" if package == "pytorchcv" else "demo")
    if package == "torchvision":
        import torchvision

        return torchvision.models.get_model(key, **options)
    if package == "pytorchcv":
        from pytorchcv.model_provider import get_model

        return get_model(key)
    import timm

    return timm.create_model(key, pretrained=False)


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
