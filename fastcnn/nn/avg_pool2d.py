"""Average pooling as a drop-in for nn.AvgPool2d."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastcnn.ops import avg_pool2d
from fastcnn.ops.layout import conv_out_sizes
from fastcnn.ops.validation import Pair, pair


class AvgPool2d(nn.AvgPool2d):
    """nn.AvgPool2d on fastcnn's kernels; same arguments.

    Shapes: x [N, C, H, W] to [N, C, P, Q]. What the kernels do not have (ceil_mode, divisor_override, an image without a
    batch) is torch's own.
    """

    def is_plain(self) -> bool:
        """Whether the kernels have this kind of pooling."""
        return not self.ceil_mode and self.divisor_override is None

    def keeps_size(self) -> bool:
        """Whether the kernels have it and leave an image of at least as many pixels, whatever its size."""
        kernel, stride, padding = self._window()
        return (
            self.is_plain() and stride == (1, 1) and all(2 * p >= k - 1 for p, k in zip(padding, kernel, strict=True))
        )

    def _window(self) -> tuple[Pair, Pair, Pair]:
        kernel, stride = pair(self.kernel_size, "kernel_size", 1), pair(self.stride, "stride", 1)
        return kernel, stride, pair(self.padding, "padding", 0)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The output's [N, C, P, Q] for an input's [N, C, H, W], where the kernels make it."""
        return *shape[:2], *conv_out_sizes(shape[2:], *self._window())

    def forward(self, x: Tensor) -> Tensor:
        """The mean of every window."""
        if not self.is_plain() or x.dim() != 4 or x.numel() == 0:
            return super().forward(x)
        return avg_pool2d(x, *self._window(), self.count_include_pad)
