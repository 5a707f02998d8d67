"""Operations and bytes of one call, of fastcnn's primitives and of torch's own ops."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from fastcnn import backends

Shaped = Any  # a Tensor, or what stands in for a packed weight: it has a shape


@cache
def _signature(primitive: str) -> inspect.Signature:
    return inspect.signature(backends.REFERENCES[primitive])


def named(primitive: str, args: Sequence) -> dict[str, Any]:
    """A primitive's arguments by name."""
    return dict(_signature(primitive).bind(*args).arguments)


def _macs_per_output(weight: Shaped) -> int:
    """Multiply-adds for each pixel of a convolution's output."""
    return math.prod(weight.shape)


def _forward_operations(arguments: Mapping[str, Any], y: Tensor) -> float:
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    total = 0.0
    for name in ("weight", "dw_weight", "pw_weight", "project_weight"):
        if arguments.get(name) is not None:
            total += 2.0 * pixels * _macs_per_output(arguments[name])
    if arguments.get("expand_weight") is not None:
        x = arguments["x"]
        total += 2.0 * x.shape[0] * x.shape[2] * x.shape[3] * _macs_per_output(arguments["expand_weight"])
    return total


def _capsule_operations(arguments: Mapping[str, Any]) -> float:
    """The votes once, their sums in every iteration and their agreements in all but the first; twice that backward."""
    u, weight = arguments["u"], arguments["weight"]
    iterations = arguments["iterations"] if "iterations" in arguments else arguments["s"].shape[0]
    votes = u.shape[0] * math.prod(weight.shape)
    forward = 2.0 * votes + (2 * iterations - 1) * 2.0 * votes / weight.shape[2]
    return forward if "iterations" in arguments else 2 * forward


def primitive_operations(primitive: str, args: Sequence, output: object) -> float:
    """Multiplications and additions of a primitive's call, prologues and epilogues left out."""
    arguments = named(primitive, args)
    if primitive.startswith("capsule"):
        return _capsule_operations(arguments)
    if "need_dw" in arguments:
        grad, wanted = arguments["grad"], arguments.get("need_dx", True) + arguments["need_dw"]
        return wanted * _forward_operations({"weight": arguments["weight"]}, grad)
    if any(name.endswith("weight") for name in arguments):
        return _forward_operations(arguments, next(iter(tensors([output]))))
    if "kernel" in arguments:  # pooling: a comparison for each tap
        return float(math.prod(arguments["kernel"]) * sum(t.numel() for t in tensors([output])))
    if primitive.startswith("local_response_norm"):  # a product and a sum for each channel of a window; two backward
        return (4.0 if "grad" in arguments else 2.0) * arguments["size"] * args[0].numel()
    return 2.0 * args[0].numel()  # a scale and a shift, or two sums


def torch_operations(func: OpOverload, args: Sequence, kwargs: Mapping, output: object) -> float:
    """torch's own count; where it has none, one operation for each element of the output."""
    count = flop_registry.get(func.overloadpacket)
    if count is not None:
        return float(count(*args, **kwargs, out_val=output))
    return float(sum(t.numel() for t in tensors([output])))


def tensors(values: Iterable) -> Iterator[Tensor]:
    """The tensors among values, in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)


def traffic(args: Sequence, output: object) -> float:
    """Bytes of everything that is read and written, each tensor once."""
    seen = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors([*args, output])}
    # A packed weight counts as the weight that it stands in for, without the padding of its panels.
    packed = [a for a in args if not isinstance(a, Tensor) and hasattr(a, "shape")]
    return float(sum(seen.values()) + sum(math.prod(p.shape) * p.dtype.itemsize for p in packed))
