"""Convolution, BatchNorm and activation as one fused layer: stems and heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastcnn.nn.fused import FusedModule, Unit, activation_name, op_of

Pair = tuple[int, int]


class ConvNormAct(FusedModule, nn.Sequential):
    """Convolution, normalisation and activation in one pass; torchvision's Conv2dNormActivation in keys and arguments.

    Keys: ``0`` the convolution, ``1`` the normalisation. The three can still be called one by one.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, dilation: as nn.Conv2d takes them.
        padding: None keeps the size at stride 1.
        norm_layer: makes an nn.BatchNorm2d of a number of channels; None: no normalisation.
        activation_layer: nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish or None.
        bias: None: only without a normalisation.

    Shapes: x [N, in_channels, H, W] in NCHW or NHWC memory; the result [N, out_channels, P, Q] is channels_last.

    Raises:
        TypeError: a normalisation or an activation that the kernels do not apply.
        ValueError: a bias beside a normalisation, which would cancel it.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding is None:
            k, d = ((v, v) if isinstance(v, int) else v for v in (kernel_size, dilation))
            padding = ((k[0] - 1) // 2 * d[0], (k[1] - 1) // 2 * d[1])
        if bias and norm_layer is not None:
            raise ValueError("bias: got True beside a normalisation, expected False or None")
        bias = norm_layer is None if bias is None else bias
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        layers: list[nn.Module] = [conv]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels).to(device=device, dtype=dtype))
        if activation_layer is not None:
            layers.append(activation_layer())
        super().__init__(*layers)
        self.out_channels = out_channels
        self.act = activation_name(layers[-1] if activation_layer is not None else None)
        self.has_norm = norm_layer is not None

    def units(self) -> list[Unit]:
        """The one convolution that this layer is."""
        return [Unit((self[0],), self[1] if self.has_norm else None, self.act)]

    def extra_repr(self) -> str:
        """Which kernel runs the layer."""
        return f"fused: {op_of(self[0])}"
