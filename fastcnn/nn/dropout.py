"""Dropout layers over the fused op: torch's and timm's arguments."""

from __future__ import annotations

from torch import Tensor, nn

from fastcnn import ops


class Dropout(nn.Dropout):
    """nn.Dropout without a mask in memory; same arguments. What is dropped is 0, even where the input is a NaN.

    Shapes: any, the result in the input's memory layout.
    Source: `fastcnn.ops.dropout`.

    Raises:
        ValueError: p outside [0, 1] (torch's own message, at construction).
    """

    def forward(self, x: Tensor) -> Tensor:
        """x in eval mode; in training x with elements zeroed and the rest divided by 1 - p."""
        return ops.dropout(x, self.p, self.training, self.inplace)


class Dropout2d(nn.Dropout2d):
    """nn.Dropout2d, whole channels of each sample, without a mask in memory; same arguments.

    Shapes: [N, C, ...] (torch takes three dimensions for one sample [C, H, W]: so does this).
    Source: `fastcnn.ops.dropout2d`.

    Raises:
        ValueError: p outside [0, 1]; an input with fewer than two dimensions.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x in eval mode; in training x with channels zeroed and the rest divided by 1 - p."""
        if x.dim() == 3:
            return ops.dropout2d(x[None], self.p, self.training, self.inplace)[0]
        return ops.dropout2d(x, self.p, self.training, self.inplace)


class DropPath(nn.Module):
    """Stochastic depth: whole samples of a residual branch; timm's arguments.

    Shapes: [N, ...]. ``forward(x, residual)`` adds a residual in the same pass.
    Source: `fastcnn.ops.drop_path`.

    Raises:
        ValueError: drop_prob outside [0, 1] (at the first call).
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x, in training with samples zeroed and the rest divided by 1 - drop_prob, plus residual."""
        return ops.drop_path(x, self.drop_prob, self.training, self.scale_by_keep, residual=residual)

    def extra_repr(self) -> str:
        """The probability."""
        return f"drop_prob={self.drop_prob:g}"
