"""MobileNet-v2's block as one fused layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastcnn.nn.conv_bn_act import ConvBNAct
from fastcnn.nn.folded import FoldedResidual
from fastcnn.nn.fused import FusedModule, Unit, convolutions, is_foldable, run_units


class InvertedResidual(FusedModule):
    """1x1 expansion, 3x3 depthwise and linear 1x1 projection, each with BatchNorm, ReLU6 after the first two; plus x
    when the stride is 1 and the channels stay. One chain, forward and backward.

    Keys and arguments: torchvision's InvertedResidual (``conv.0.0.weight``, ``conv.0.1.*``, ...). ``conv`` holds the state;
    it is not called, so hooks inside it do not fire.

    Args:
        inp, oup: channels in and out.
        stride: of the depthwise convolution, 1 or 2.
        expand_ratio: hidden channels over inp; 1 leaves the expansion out.
        norm_layer: makes an nn.BatchNorm2d of a number of channels.

    Shapes: x [N, inp, H, W] in NCHW or NHWC memory; the result [N, oup, P, Q] is channels_last.
    Source: MobileNet-v2 (arXiv 1801.04381, section 3.3).

    Raises:
        ValueError: another stride.
        TypeError: a norm_layer that makes no nn.BatchNorm2d (at the first call).
    """

    def __init__(
        self,
        inp: int,
        oup: int,
        stride: int,
        expand_ratio: float,
        norm_layer: Callable[[int], nn.BatchNorm2d] | None = None,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride: got {stride}, expected 1 or 2")
        norm_layer = norm_layer or nn.BatchNorm2d
        hidden = round(inp * expand_ratio)
        self.stride, self.out_channels = stride, oup
        self.use_res_connect = stride == 1 and inp == oup
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(ConvBNAct(inp, hidden, 1, norm_layer=norm_layer, activation_layer=nn.ReLU6))
        layers += [
            ConvBNAct(hidden, hidden, 3, stride, groups=hidden, norm_layer=norm_layer, activation_layer=nn.ReLU6),
            nn.Conv2d(hidden, oup, 1, bias=False),
            norm_layer(oup),
        ]
        self.conv = nn.Sequential(*layers)

    def units(self) -> list[Unit]:
        """Expansion (if any), depthwise, projection."""
        *inner, project, norm = self.conv
        return [*(unit for layer in inner for unit in layer.units()), Unit((project,), norm)]

    def forward(self, x: Tensor) -> Tensor:
        """The block's output.

        Raises:
            TypeError, ValueError: an input that does not fit the block.
        """
        return run_units(x, self.units(), residual=x if self.use_res_connect else None)

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), or None where a BatchNorm keeps no running statistics."""
        units = self.units()
        if not self.use_res_connect:
            return super().folded(dtype)
        return FoldedResidual(convolutions(units, frozen=True), "none", dtype) if is_foldable(units) else None

    def extra_repr(self) -> str:
        """What is fused."""
        return f"fused: {len(self.units())} convolutions, stride={self.stride}, residual={self.use_res_connect}"
