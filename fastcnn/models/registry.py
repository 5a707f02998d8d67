"""Names of models and the functions that make them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable

from torch import nn

Builder = Callable[..., nn.Module]

_BUILDERS: dict[str, Builder] = {}


def register(builder: Builder) -> Builder:
    """Decorates a function (num_classes, weights, **options) -> model; its name is the model's."""
    _BUILDERS[builder.__name__] = builder
    return builder


def list_models() -> list[str]:
    """The names that `create_model` takes, sorted."""
    return sorted(_BUILDERS)


def create_model(
    name: str, num_classes: int = 1000, weights: str | os.PathLike[str] | None = None, **options: object
) -> nn.Module:
    """A model by its name, in training mode, as torch's constructors return it.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier.
        weights: a path or a URL of a .pth or .safetensors file with the reference's keys (`fastcnn.models.weights`);
            None: random initialisation, the reference's.
        options: the model's own (see its function).

    Raises:
        ValueError: an unknown name, num_classes below 1, or weights that do not fit.
        OSError: the weights cannot be read.
        TypeError: an option that the model lacks.
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(str(name), _BUILDERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(list_models())}{hint}")
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes!r}, expected an integer of at least 1")
    return _BUILDERS[name](num_classes=num_classes, weights=weights, **options)
