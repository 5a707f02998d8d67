"""Registers the primitives with torch: schema, fake and one implementation that asks the backend table."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from fastcnn import backends

Pair = tuple[int, int]
Mutable = Tensor  # an argument that the primitive writes to

LIBRARY = torch.library.Library("fastcnn", "DEF")

# `define` and `impl` cost 2.7 us a call, the custom_op decorator 39 us (torch 2.11): hence the schema by hand.
_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "Mutable": "Tensor(a!)",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "Pair": "int[2]",
    "None": "()",
    "tuple[Tensor, Tensor]": "(Tensor, Tensor)",
    "tuple[Tensor, Tensor, Tensor]": "(Tensor, Tensor, Tensor)",
}


def schema(reference: Callable) -> str:
    """The torch schema of a primitive, read from its reference's annotations."""
    signature = inspect.signature(reference)
    arguments = ", ".join(f"{_SCHEMA_TYPES[p.annotation]} {p.name}" for p in signature.parameters.values())
    return f"{reference.__name__}({arguments}) -> {_SCHEMA_TYPES[signature.return_annotation]}"


def register(fake: Callable) -> Callable[[Callable], Callable]:
    """Decorates a primitive's reference: defines torch.ops.fastcnn.<name> and enters it in the backend table."""

    def decorate(reference: Callable) -> Callable:
        name = reference.__name__
        backends.REFERENCES[name] = reference

        def implementation(*args):
            return backends.choose(name, args)(*args)

        LIBRARY.define(schema(reference))
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastcnn::{name}", fake, lib=LIBRARY)
        return reference

    return decorate
