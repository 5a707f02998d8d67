"""Names of models and the functions that make them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

Builder = Callable[..., nn.Module]


class InputFormat(NamedTuple):
    """The images that a model is trained on: pixels along an axis, channels, and the values' range.

    Values are normalised to mean 0 and deviation 1 of the training set, or lie in [0, 1] for models that make images
    themselves.
    """

    size: int
    channels: int
    normalised: bool


class _Entry(NamedTuple):
    builder: Builder
    input: InputFormat


_MODELS: dict[str, _Entry] = {}


def register(image_size: int = 224, channels: int = 3, normalised: bool = True) -> Callable[[Builder], Builder]:
    """Decorates a function (num_classes, weights, **options) -> model; its name is the model's.

    The arguments are the fields of the model's `InputFormat`.
    """

    def decorate(builder: Builder) -> Builder:
        _MODELS[builder.__name__] = _Entry(builder, InputFormat(image_size, channels, normalised))
        return builder

    return decorate


def list_models() -> list[str]:
    """The names that `create_model` takes, sorted."""
    return sorted(_MODELS)


def _entry(name: str) -> _Entry:
    if name not in _MODELS:
        near = difflib.get_close_matches(str(name), _MODELS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(list_models())}{hint}")
    return _MODELS[name]


def image_size(name: str) -> int:
    """The pixels along an axis of the images that a model is trained on.

    Raises:
        ValueError: an unknown name.
    """
    return _entry(name).input.size


def input_format(name: str) -> InputFormat:
    """The images that a model is trained on.

    Raises:
        ValueError: an unknown name.
    """
    return _entry(name).input


def create_model(
    name: str, num_classes: int | None = None, weights: str | os.PathLike[str] | None = None, **options: object
) -> nn.Module:
    """A model by its name, in training mode, as torch's constructors return it.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier; None: 1000, or 10 for the CIFAR and MNIST models.
        weights: a path or a URL of a .pth or .safetensors file with the reference's keys (`fastcnn.models.weights`);
            None: random initialisation, the reference's.
        options: the model's own (see its function).

    Raises:
        ValueError: an unknown name, num_classes below 1, or weights that do not fit.
        OSError: the weights cannot be read.
        TypeError: an option that the model lacks.
    """
    builder = _entry(name).builder
    if num_classes is None:
        return builder(weights=weights, **options)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes!r}, expected an integer of at least 1")
    return builder(num_classes=num_classes, weights=weights, **options)
