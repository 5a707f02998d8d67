"""Depthwise-separable convolution with its normalisations and activations as one fused layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastcnn.nn.fused import FusedModule, Unit
from fastcnn.ops.separable_conv2d import ORDERS
from fastcnn.ops.validation import check_activation, check_choice

Pair = tuple[int, int]
NormLayer = Callable[[int], nn.BatchNorm2d]


class SeparableConv2d(FusedModule):
    """Depthwise convolution, then pointwise, each with an optional BatchNorm and activation, in one pass.

    Keys: ``depthwise.weight``, ``pointwise.weight``, ``pointwise.bias``, ``mid_norm.*``, ``out_norm.*``: those of the plain
    composition nn.Sequential(OrderedDict(depthwise=..., mid_norm=..., pointwise=..., out_norm=...)).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation: of the whole; the depthwise convolution has
            kernel_size (odd, at most 31), stride, padding and dilation.
        bias: a bias at the end; only without out_norm.
        depth_multiplier: filters per channel of the depthwise convolution.
        order: "depthwise_first" (the papers' code) or "pointwise_first" (extreme Inception).
        in_act: an activation before the first convolution (Xception).
        mid_norm, mid_act: between the two; a norm layer makes an nn.BatchNorm2d of a number of channels.
        out_norm, out_act: after the second.

    Shapes: x [N, in_channels, H, W] in NCHW or NHWC memory; the result [N, out_channels, P, Q] and ``residual``, which is
    added to it, are channels_last.
    Source: Xception (arXiv 1610.02357, section 3), MobileNet (arXiv 1704.04861, section 3.1).

    Raises:
        ValueError: an unknown order or activation, a bias beside out_norm, an even kernel or one above 31, or pointwise
            first with out_channels that depth_multiplier does not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        bias: bool = False,
        *,
        depth_multiplier: int = 1,
        order: str = "depthwise_first",
        in_act: str = "none",
        mid_norm: NormLayer | None = None,
        mid_act: str = "none",
        out_norm: NormLayer | None = None,
        out_act: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice(order, "order", ORDERS)
        for name, act in (("in_act", in_act), ("mid_act", mid_act), ("out_act", out_act)):
            check_activation(act, name)
        if bias and out_norm is not None:
            raise ValueError("bias: got True beside out_norm, expected False")
        self.in_channels, self.out_channels, self.order = in_channels, out_channels, order
        self.in_act, self.mid_act, self.out_act = in_act, mid_act, out_act
        where = {"device": device, "dtype": dtype}
        pointwise_first = order == "pointwise_first"
        if pointwise_first and out_channels % depth_multiplier:
            raise ValueError(f"out_channels: got {out_channels}, expected a multiple of {depth_multiplier}")
        hidden = out_channels // depth_multiplier if pointwise_first else in_channels * depth_multiplier
        width = hidden if pointwise_first else in_channels
        depthwise = nn.Conv2d(
            width, width * depth_multiplier, kernel_size, stride, padding, dilation, width,
            bias=bias and pointwise_first, **where,
        )  # fmt: skip
        if any(k % 2 == 0 or k > 31 for k in depthwise.kernel_size):
            raise ValueError(f"kernel_size: got {kernel_size}, expected odd numbers up to 31")
        inputs, outputs = (in_channels, hidden) if pointwise_first else (hidden, out_channels)
        pointwise = nn.Conv2d(inputs, outputs, 1, bias=bias and not pointwise_first, **where)
        layers = {
            "depthwise": depthwise,
            "mid_norm": mid_norm and mid_norm(hidden).to(**where),
            "pointwise": pointwise,
            "out_norm": out_norm and out_norm(out_channels).to(**where),
        }
        names = ("pointwise", "mid_norm", "depthwise", "out_norm") if pointwise_first else tuple(layers)
        for name in names:
            self.add_module(name, layers[name])

    def units(self) -> list[Unit]:
        """The two convolutions in their order; one unit of two weights when nothing stands between them."""
        first, second = self.depthwise, self.pointwise
        if self.order == "pointwise_first":
            first, second = second, first
        elif self.mid_norm is None and self.mid_act == "none":
            return [Unit((first, second), self.out_norm, self.out_act)]
        return [Unit((first,), self.mid_norm, self.mid_act), Unit((second,), self.out_norm, self.out_act)]

    def extra_repr(self) -> str:
        """The chain from input to output."""
        conv = self.depthwise
        geometry = f"{conv.kernel_size[0]}x{conv.kernel_size[1]}, stride={conv.stride}, padding={conv.padding}"
        acts = {"in_act": self.in_act, "mid_act": self.mid_act, "out_act": self.out_act}
        named = "".join(f", {name}={act}" for name, act in acts.items() if act != "none")
        return f"{self.in_channels}, {self.out_channels}, {geometry}, {self.order}{named}"
