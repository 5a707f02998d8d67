"""Depthwise convolution as a drop-in for nn.Conv2d."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.nn.fused import Unit, check_channels, padding_of
from fastcnn.nn.sequential import fold_units
from fastcnn.ops import depthwise_conv2d

Pair = tuple[int, int]


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d with groups == in_channels, on fastcnn's depthwise kernels; same arguments, same state_dict keys.

    Args:
        in_channels, out_channels: out_channels is in_channels times the depth multiplier; None: the same.
        kernel_size: odd, at most 31 along each axis. Default: 3.
        stride, padding, dilation, bias, padding_mode, device, dtype: as nn.Conv2d takes them, strings too.
        groups: in_channels, which is also its default.

    Shapes: x [N, in_channels, H, W] in NCHW or NHWC memory; the result [N, out_channels, P, Q] is channels_last.
    Dtypes: as `fastcnn.ops.depthwise_conv2d`.

    Raises:
        ValueError: groups other than in_channels, an even kernel or one above 31.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | Pair = 3,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups is not None and groups != in_channels:
            raise ValueError(f"groups: got {groups}, expected in_channels, {in_channels}")
        out_channels = in_channels if out_channels is None else out_channels
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, in_channels, bias, padding_mode,
            device=device, dtype=dtype,
        )  # fmt: skip
        if any(k % 2 == 0 or k > 31 for k in self.kernel_size):
            raise ValueError(f"kernel_size: got {kernel_size}, expected odd numbers up to 31")

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x [N, in_channels, H, W].

        Raises:
            TypeError, ValueError: an input that does not fit the layer.
        """
        check_channels(x, self.in_channels)
        padding = padding_of(self)
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return depthwise_conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation)

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), or None with a padding mode that no kernel has."""
        return fold_units([Unit((self,))], dtype) if self.padding_mode == "zeros" else None
