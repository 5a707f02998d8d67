"""Checks of what a caller passes: a message that names the argument, what came and what was expected.

Every check is a comparison on the way of a good call; labels and messages are made only when one fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastcnn.ops import activations
from fastcnn.ops.layout import autocast_dtype, conv_out_sizes, pixel_stride

if TYPE_CHECKING:
    from fastcnn.ops.dense_layers import DenseLayer
    from fastcnn.ops.normalisation import Affine, BatchNorm
    from fastcnn.ops.stages import Conv

Pair = tuple[int, int]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
MAX_DEPTHWISE_KERNEL = 31

# How many weights each op takes.
OPS = {"identity": 0, "pointwise": 1, "depthwise": 1, "separable": 2, "conv2d": 1, "average": 0}


class Labels(NamedTuple):
    """What a public function calls the parts of one convolution of its chain."""

    weights: tuple[str, ...] = ("weight",)
    norm: str | None = None  # the argument that takes a BatchNorm or Affine whole
    scale: str = "scale"
    shift: str = "bias"
    act: str = "act"
    bias: str = "bias"


def chain_labels(index: int) -> Labels:
    """The labels of convs[index] of conv_chain itself."""
    at = f"convs[{index}]"
    return Labels((f"{at}.weights[0]", f"{at}.weights[1]"), f"{at}.norm", act=f"{at}.act", bias=f"{at}.bias")


_CHAIN_LABELS = tuple(chain_labels(i) for i in range(16))


def shape_of(t: Tensor) -> str:
    """A tensor's shape as the messages write it."""
    return str(list(t.shape))


def pair(value: int | Sequence[int], name: str, least: int) -> Pair:
    """(v, v) for an integer v, or the two integers given.

    Raises:
        ValueError: something else, or a value below ``least``.
    """
    if type(value) is int:
        if value >= least:
            return value, value
    elif (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(v, (int, torch.SymInt)) and v >= least for v in value)
    ):
        return value[0], value[1]
    raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}, or two of them")


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")


def check_activation(value: str | None, name: str) -> None:
    """Raises ValueError for an activation that no epilogue knows."""
    if value is not None and value not in activations.NAMES:
        check_choice(value, name, activations.NAMES)


def _bad_tensor(t: object, name: str, x: Tensor) -> None:
    """Raises for a tensor that cannot work with x; returns when autocast makes its dtype right."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, expected a torch.Tensor")
    if t.device != x.device:
        raise ValueError(f"{name}: got a tensor on {t.device}, expected {x.device}, where x is")
    if t.dtype in DTYPES and torch.is_autocast_enabled(x.device.type):
        return
    if not (t.dtype == torch.float32 and x.dtype in HALVES):
        wanted = "torch.float32 or x's " if x.dtype in HALVES else "x's "
        raise TypeError(f"{name}: got {t.dtype}, expected {wanted}{x.dtype}")


def _check_weight(t: Tensor, name: str, x: Tensor) -> None:
    if not isinstance(t, Tensor) or t.dtype != x.dtype or t.device != x.device:
        _bad_tensor(t, name, x)


def _bad_shape(t: Tensor, name: str, expected: str) -> NoReturn:
    raise ValueError(f"{name}: got shape {shape_of(t)}, expected {expected}")


def _check_pointwise(w: Tensor, name: str, channels: int) -> int:
    shape = w.shape
    if len(shape) != 4 or shape[1] != channels or shape[0] == 0 or shape[2] != 1 or shape[3] != 1:
        _bad_shape(w, name, f"[C, {channels}, 1, 1]")
    return shape[0]


def _check_depthwise(w: Tensor, name: str, channels: int) -> int:
    shape = w.shape
    if len(shape) != 4 or shape[1] != 1 or shape[0] == 0 or shape[0] % channels:
        _bad_shape(w, name, f"[{channels} * depth multiplier, 1, R, S]")
    for k in shape[2:]:
        if k % 2 == 0 or k > MAX_DEPTHWISE_KERNEL:
            _bad_shape(w, name, f"odd kernel sizes from 1 to {MAX_DEPTHWISE_KERNEL}")
    return shape[0]


def _check_general(w: Tensor, name: str, channels: int, groups: int) -> int:
    shape = w.shape
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: got {groups}, expected a divisor of x's {channels} channels")
    if len(shape) != 4 or shape[1] * groups != channels or 0 in shape or shape[0] % groups:
        _bad_shape(w, name, f"[C, {channels // groups}, R, S] with C a multiple of groups = {groups}")
    return shape[0]


def _bad_vector(t: Tensor | None, name: str, channels: int, x: Tensor) -> None:
    """Raises for a per-channel tensor that cannot work with x; returns for one that can."""
    if t is None:
        return
    if not isinstance(t, Tensor) or t.device != x.device or t.dtype not in DTYPES:
        _bad_tensor(t, name, x)
    if t.dim() != 1 or t.numel() != channels:
        _bad_shape(t, name, f"[{channels}]")


def _check_norm(norm: Affine | BatchNorm, labels: Labels, channels: int, x: Tensor) -> None:
    device = x.device
    names: tuple[str, ...] = ("weight", "bias", "running_mean", "running_var")
    if len(norm) == 2:  # Affine
        names = (labels.scale, labels.shift)
    elif not norm.training and (norm.running_mean is None or norm.running_var is None):
        raise ValueError(f"{labels.norm}.running_mean, running_var: got None, expected tensors as training is False")
    for t, name in zip(norm, names):
        if t is None:
            continue
        good = isinstance(t, Tensor) and t.dim() == 1 and t.numel() == channels
        if not good or t.device != device or t.dtype not in DTYPES:
            _bad_vector(t, f"{labels.norm}.{name}" if labels.norm else name, channels, x)


def _check_weights(conv: Conv, labels: Labels, x: Tensor, channels: int) -> int:
    """The convolution's output channels."""
    weights = conv.weights
    if conv.op not in OPS:
        check_choice(conv.op, "op", tuple(OPS))
    if len(weights) != OPS[conv.op]:
        raise ValueError(f"weights of a {conv.op} convolution: got {len(weights)}, expected {OPS[conv.op]}")
    for w, name in zip(weights, labels.weights):
        _check_weight(w, name, x)
    if conv.op in ("identity", "average"):
        return channels
    name = labels.weights[0]
    if conv.op == "pointwise":
        return _check_pointwise(weights[0], name, channels)
    if conv.op == "conv2d":
        return _check_general(weights[0], name, channels, conv.groups)
    channels = _check_depthwise(weights[0], name, channels)
    return channels if conv.op == "depthwise" else _check_pointwise(weights[1], labels.weights[1], channels)


def kernel_of(conv: Conv) -> Pair:
    """The window of one stage of a chain."""
    if conv.weights:
        return tuple(conv.weights[0].shape[2:])
    return conv.stride if conv.op == "average" else (1, 1)


def check_input(x: Tensor) -> None:
    """Raises unless x is a floating [N, K, H, W] tensor of which at most the batch is empty."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a torch.Tensor")
    if x.dim() != 4:
        raise ValueError(f"x: got shape {shape_of(x)}, expected 4 dimensions [N, K, H, W]")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {shape_of(x)}, expected no empty dimension but the batch")


def check_chain(
    x: Tensor,
    convs: Sequence[Conv],
    in_act: str | None,
    residual: Tensor | None,
    labels: Sequence[Labels] | None,
    act_after_residual: bool = False,
    out: Tensor | None = None,
) -> None:
    """Raises unless conv_chain(x, convs, in_act, residual, labels, act_after_residual, out) is defined.

    Raises:
        TypeError: not a tensor, or a dtype that cannot be.
        ValueError: a shape, a device, an activation or an op that cannot be.
    """
    check_input(x)
    if not convs:
        raise ValueError("convs: got no convolution, expected at least one")
    if any(conv.op == "identity" for conv in convs[1:]):
        raise ValueError("convs: got an identity after a convolution, expected it only as the first of the chain")
    if any(
        c.op == "average" and (c.norm is not None or c.bias is not None or c.act not in ("none", None)) for c in convs
    ):
        raise ValueError("convs: got an average with a norm, bias or act, expected them at the stages around it")
    if convs[-1].op == "average":
        raise ValueError("convs: got an average as the last of the chain, expected a convolution after it")
    if convs[0].op == "identity" and in_act not in ("none", None):
        raise ValueError(f"in_act: got {in_act!r} before an identity, expected the identity's own act")
    if act_after_residual and activations.code(convs[-1].act) not in activations.KNOWN_FROM_OUTPUT:
        raise ValueError(f"act: got {convs[-1].act!r} after the residual, expected none, relu or relu6")
    check_activation(in_act, "in_act")
    n, channels, *size = x.shape
    for i, conv in enumerate(convs):
        names = labels[i] if labels else _CHAIN_LABELS[i] if i < 16 else chain_labels(i)
        channels = _check_weights(conv, names, x, channels)
        kernel = kernel_of(conv)
        before = size
        if conv.op != "pointwise" or conv.stride != (1, 1):
            size = conv_out_sizes(size, kernel, conv.stride, conv.padding, conv.dilation)
        if size[0] < 1 or size[1] < 1:
            raise ValueError(
                f"x: got {before[0]} x {before[1]} pixels before {names.weights[0]}, expected at least the reach of"
                f" its {kernel[0]} x {kernel[1]} kernel with padding {conv.padding} and dilation {conv.dilation}"
            )
        if conv.norm is not None:
            _check_norm(conv.norm, names, channels, x)
        if conv.bias is not None:
            _bad_vector(conv.bias, names.bias, channels, x)
        check_activation(conv.act, names.act)
    if out is not None:
        check_out(out, (n, channels, *size), autocast_dtype(x), x.device)
    if residual is None:
        return
    if not isinstance(residual, Tensor) or residual.device != x.device or residual.dtype not in DTYPES:
        _bad_tensor(residual, "residual", x)
    if residual.shape != (n, channels, *size):
        _bad_shape(residual, "residual", f"the output's {[n, channels, *size]}")


def check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless a result of this shape, dtype and device can be written to out."""
    if out.shape != shape or pixel_stride(out) is None:
        strides = list(out.stride())
        raise ValueError(
            f"out: got shape {shape_of(out)}, strides {strides}, expected NHWC or a slice of it, {list(shape)}"
        )
    if out.dtype != dtype or out.device != device or out.requires_grad:
        grad = ", requires_grad" if out.requires_grad else ""
        raise ValueError(f"out: got {out.dtype} on {out.device}{grad}, expected {dtype} on {device} without a gradient")


def check_shared_pointwise(x: Tensor, weights: Sequence[Tensor]) -> None:
    """Raises unless shared_pointwise(x, weights) is defined.

    Raises:
        TypeError: not a tensor, or a dtype that cannot be.
        ValueError: a shape or a device that cannot be.
    """
    check_input(x)
    if not weights:
        raise ValueError("weights: got none, expected at least one")
    for i, weight in enumerate(weights):
        _check_weight(weight, f"weights[{i}]", x)
        _check_pointwise(weight, f"weights[{i}]", x.shape[1])


def check_dense_block(x: Tensor, layers: Sequence[DenseLayer], drop_rate: float) -> None:
    """Raises unless dense_block(x, layers, drop_rate) is defined.

    Raises:
        TypeError: not a tensor, or a dtype that cannot be.
        ValueError: a shape, a device or a drop_rate that cannot be.
    """
    check_input(x)
    if not layers:
        raise ValueError("layers: got no layer, expected at least one")
    if not (isinstance(drop_rate, (int, float)) and 0 <= drop_rate <= 1):
        raise ValueError(f"drop_rate: got {drop_rate!r}, expected a probability from 0 to 1")
    channels, growth = x.shape[1], None
    for i, layer in enumerate(layers):
        at = f"layers[{i}]"
        for name in ("weight1", "weight2"):
            _check_weight(getattr(layer, name), f"{at}.{name}", x)
        _check_norm(layer.norm1, Labels(norm=f"{at}.norm1"), channels, x)
        middle = _check_pointwise(layer.weight1, f"{at}.weight1", channels)
        _check_norm(layer.norm2, Labels(norm=f"{at}.norm2"), middle, x)
        shape = tuple(layer.weight2.shape)
        growth = shape[0] if growth is None and shape else growth
        if shape != (growth, middle, 3, 3):
            _bad_shape(layer.weight2, f"{at}.weight2", f"[{growth}, {middle}, 3, 3]")
        channels += growth
