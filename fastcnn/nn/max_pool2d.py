"""Maximum pooling as a drop-in for nn.MaxPool2d."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastcnn.ops import max_pool2d
from fastcnn.ops.layout import pool_out_sizes
from fastcnn.ops.validation import Pair, pair


class MaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d on fastcnn's kernels, with a gradient on CPUs only; same arguments.

    Shapes: x [N, C, H, W] to [N, C, P, Q]. What the kernels do not have (dilation, return_indices, an image without a
    batch) is torch's own.
    """

    def is_fused(self, x: Tensor) -> bool:
        """Whether the kernels have what is asked for."""
        return self.dilation in (1, (1, 1)) and not self.return_indices and x.dim() == 4

    def _window(self) -> tuple[Pair, Pair, Pair, bool]:
        kernel, stride = pair(self.kernel_size, "kernel_size", 1), pair(self.stride, "stride", 1)
        return kernel, stride, pair(self.padding, "padding", 0), self.ceil_mode

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The output's [N, C, P, Q] for an input's [N, C, H, W], where the kernels make it."""
        return *shape[:2], *pool_out_sizes(shape[2:], *self._window())

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The largest value of every window; ``out`` is as `fastcnn.ops.max_pool2d` takes it."""
        return max_pool2d(x, *self._window(), out=out) if self.is_fused(x) else super().forward(x)
