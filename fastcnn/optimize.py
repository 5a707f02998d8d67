"""The inference form of a model: BatchNorm folded into weights, fused blocks, one dtype from end to end."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastcnn.nn.folded import folding_of
from fastcnn.ops.validation import DTYPES
from fastcnn.replay import Replays, is_repeatable


def _replace(module: nn.Module, dtype: torch.dtype | None, done: dict[int, nn.Module]) -> nn.Module:
    """The inference form of a module of a private copy; modules that have none keep their type."""
    if id(module) in done:  # one layer used in two places stays one
        return done[id(module)]
    folded = folding_of(module)
    result = folded(dtype) if folded else None
    if result is None:
        result = module
        for name, child in module.named_children():
            setattr(module, name, _replace(child, dtype, done))
        if dtype is not None:
            _convert(module, dtype)
    done[id(module)] = result
    return result


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    """A kept module's own parameters and buffers in dtype; a BatchNorm's stay float32, which torch mixes with halves."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and dtype != torch.float64:
        return
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


class Optimized(nn.Module):
    """What `fastcnn.optimize` returns: ``body`` in inference form between two conversions of dtype.

    Takes what the model took, float tensors in float32 or in ``dtype``, and returns float32. No gradient passes.
    With ``replays`` it runs a model of one tensor as fastcnn.replay describes.
    """

    def __init__(self, body: nn.Module, dtype: torch.dtype, replays: Replays | None = None) -> None:
        super().__init__()
        self.body, self.dtype, self._replays = body, dtype, replays

    def _inwards(self, value: object) -> object:
        if not isinstance(value, Tensor) or value.dtype is self.dtype or not value.is_floating_point():
            return value
        if value.dtype is not torch.float32:
            names = " or ".join(dict.fromkeys(("torch.float32", str(self.dtype))))
            raise TypeError(f"x: got {value.dtype}, expected {names}")
        return value.to(self.dtype)

    @staticmethod
    def _outwards(value: object) -> object:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def _run(self, args: tuple, kwargs: dict) -> object:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            if self._replays is not None and not torch.compiler.is_compiling():
                return self._replays.run(self.body, args[0], self._as_it_is)
            return self._as_it_is(args[0])
        args, kwargs = tree_map(self._inwards, (args, kwargs))
        return tree_map(self._outwards, self.body(*args, **kwargs))

    def _as_it_is(self, x: Tensor) -> object:
        y = self.body(self._inwards(x))
        return self._outwards(y) if isinstance(y, Tensor) else tree_map(self._outwards, y)

    def forward(self, *args: object, **kwargs: object) -> object:
        """The model's output, float32.

        Raises:
            TypeError: a float tensor that is neither float32 nor of the model's dtype.
            ValueError: an input that does not fit a layer.
        """
        with torch.no_grad(), _no_autocast():
            return self._run(args, kwargs)

    def extra_repr(self) -> str:
        """The dtype that the body computes in."""
        return f"dtype={str(self.dtype).removeprefix('torch.')}"


def _no_autocast() -> contextlib.AbstractContextManager:
    """The body computes in its own dtype, whatever autocast says around it."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _dtype_of(model: nn.Module) -> torch.dtype:
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floating, torch.float32)


def optimize(model: nn.Module, dtype: torch.dtype | None = None, replay: bool | None = None) -> nn.Module:
    """The inference form of a model or of a layer, a plain nn.Module in eval mode.

    fastcnn's layers and models become chains with BatchNorm folded into the weights (computed in float64, rounded
    once); any other module is kept, in eval mode and in ``dtype``. The model itself is left as it was. Hooks on modules
    that are folded are not carried over.

    Args:
        model: a fastcnn model or layer, or a model that contains some.
        dtype: what to compute in: torch.float32, torch.bfloat16, torch.float16 or torch.float64; None: the parameters'
            own. The result takes float32 inputs (or ``dtype``'s) and returns float32 outputs, whatever ``dtype`` is.
        replay: whether a CPU's fourth and later calls with one shape of input run the kernels of the second again,
            on memory that is kept, and none of the Python between them (fastcnn.replay.Replays). Changed weights, layers
            and hooks are seen. None: where all modules are fastcnn's and torch.nn's; for others, True says that their
            forward does the same for every input of a shape.

    Raises:
        TypeError: model is no nn.Module, or dtype is another dtype.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype: got {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if isinstance(model, Optimized):
        raise TypeError("model: got what fastcnn.optimize returned, expected the model it came from")
    body = copy.deepcopy(model).eval().requires_grad_(False)
    own = dtype or _dtype_of(model)
    body = _replace(body, dtype, {})
    replays = Replays(own) if (is_repeatable(body) if replay is None else replay) else None
    return Optimized(body, own, replays).eval()
