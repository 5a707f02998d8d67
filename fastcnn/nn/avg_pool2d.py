"""Average pooling as a drop-in for nn.AvgPool2d."""

from __future__ import annotations

from torch import Tensor, nn

from fastcnn.ops import avg_pool2d
from fastcnn.ops.validation import pair


class AvgPool2d(nn.AvgPool2d):
    """nn.AvgPool2d on fastcnn's kernels; same arguments.

    Shapes: x [N, C, H, W] to [N, C, P, Q]. What the kernels do not have (ceil_mode, divisor_override, an image without a
    batch) is torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The mean of every window."""
        if self.ceil_mode or self.divisor_override is not None or x.dim() != 4 or x.numel() == 0:
            return super().forward(x)
        kernel, stride = pair(self.kernel_size, "kernel_size", 1), pair(self.stride, "stride", 1)
        return avg_pool2d(x, kernel, stride, pair(self.padding, "padding", 0), self.count_include_pad)
