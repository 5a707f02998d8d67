"""The layer that Inception networks are made of."""

from __future__ import annotations

from torch import nn

from fastcnn.nn.fused import FusedModule, Unit, op_of

Pair = tuple[int, int]


class BasicConv2d(FusedModule):
    """Convolution, BatchNorm with eps 1e-3 and ReLU in one pass; torchvision's and timm's keys (``conv``, ``bn``).

    In `FusedSequential`, `run_layers` and branches, layers that follow one another are one chain; they are then not called,
    so hooks on them do not fire.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as nn.Conv2d takes them.
        batch_norm: False: a bias in its place.

    Shapes: x [N, in_channels, H, W] in NCHW or NHWC memory; the result [N, out_channels, P, Q] and ``residual``, which is
    added to it, are channels_last.
    Source: Inception-v3 (arXiv 1512.00567).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=not batch_norm)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3) if batch_norm else None

    def units(self) -> list[Unit]:
        """The convolution."""
        return [Unit((self.conv,), self.bn, "relu")]

    def extra_repr(self) -> str:
        """Which kernel runs the layer."""
        return f"fused: {op_of(self.conv)}"
