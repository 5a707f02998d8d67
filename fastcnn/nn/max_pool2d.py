"""Maximum pooling as a drop-in for nn.MaxPool2d."""

from __future__ import annotations

from torch import Tensor, nn

from fastcnn.ops import max_pool2d
from fastcnn.ops.validation import pair


class MaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d on fastcnn's kernels where no gradient is asked for; same arguments.

    Shapes: x [N, C, H, W] to [N, C, P, Q]. What the kernels do not have (dilation, ceil_mode, return_indices, an image
    without a batch) is torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The largest value of every window."""
        if self.dilation not in (1, (1, 1)) or self.ceil_mode or self.return_indices or x.dim() != 4:
            return super().forward(x)
        kernel, stride = pair(self.kernel_size, "kernel_size", 1), pair(self.stride, "stride", 1)
        return max_pool2d(x, kernel, stride, pair(self.padding, "padding", 0))
