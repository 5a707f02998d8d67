"""Convolution, BatchNorm and activation as one fused layer, in either order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastcnn.nn.fused import FusedModule, Unit, activation_name, op_of
from fastcnn.ops.conv_bn_act import ORDERS
from fastcnn.ops.validation import check_choice

Pair = tuple[int, int]


def same_padding(kernel_size: int | Pair, dilation: int | Pair) -> Pair:
    """The padding that keeps an image's size at stride 1 under an odd kernel."""
    k, d = ((v, v) if isinstance(v, int) else v for v in (kernel_size, dilation))
    return (k[0] - 1) // 2 * d[0], (k[1] - 1) // 2 * d[1]


class ConvBNAct(FusedModule, nn.Sequential):
    """Convolution, normalisation and activation in one pass; torchvision's Conv2dNormActivation in keys and arguments.

    Keys: those of nn.Sequential(conv, norm, act) or, with ``order="bn_act_conv"``, of nn.Sequential(norm, act, conv), what
    is absent left out. The three can still be called one by one.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, dilation: as nn.Conv2d takes them.
        padding: None keeps the size at stride 1.
        norm_layer: makes an nn.BatchNorm2d of a number of channels; None: no normalisation.
        activation_layer: nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish or None.
        bias: None: only without a normalisation.
        order: "conv_bn_act", or the pre-activation "bn_act_conv".

    Shapes: x [N, in_channels, H, W] in NCHW or NHWC memory; the result [N, out_channels, P, Q] and ``residual``, which is
    added to it, are channels_last.
    Dtypes: as `fastcnn.ops.conv_bn_act`.

    Raises:
        TypeError: an activation that the kernels do not apply; a normalisation likewise (at the first call).
        ValueError: an unknown order.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        stride: int | Pair = 1,
        padding: int | Pair | None = None,
        groups: int = 1,
        norm_layer: Callable[[int], nn.BatchNorm2d] | None = nn.BatchNorm2d,
        activation_layer: Callable[[], nn.Module] | None = nn.ReLU,
        dilation: int | Pair = 1,
        bias: bool | None = None,
        order: str = "conv_bn_act",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice(order, "order", ORDERS)
        padding = same_padding(kernel_size, dilation) if padding is None else padding
        bias = norm_layer is None if bias is None else bias
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        pre_activation = order == "bn_act_conv"
        channels = in_channels if pre_activation else out_channels
        norm = None if norm_layer is None else norm_layer(channels).to(device=device, dtype=dtype)
        act = None if activation_layer is None else activation_layer()
        layers = (norm, act, conv) if pre_activation else (conv, norm, act)
        super().__init__(*(layer for layer in layers if layer is not None))
        self.out_channels, self.order = out_channels, order
        self.act = activation_name(act)
        self.has_norm = norm is not None

    def units(self) -> list[Unit]:
        """The convolution that this layer is, after its pre-activation if it has one."""
        if self.order == "conv_bn_act":
            return [Unit((self[0],), self[1] if self.has_norm else None, self.act)]
        pre = Unit((), self[0] if self.has_norm else None, self.act)
        return [pre, Unit((self[-1],))]

    def extra_repr(self) -> str:
        """Which kernel runs the layer."""
        return f"fused: {op_of(self[-1 if self.order == 'bn_act_conv' else 0])}, order={self.order}"
