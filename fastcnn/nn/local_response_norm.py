"""Local response normalisation as a drop-in for nn.LocalResponseNorm."""

from __future__ import annotations

from torch import Tensor, nn


class LocalResponseNorm(nn.LocalResponseNorm):
    """nn.LocalResponseNorm; halves are normalised in float32, which torch refuses to do in bfloat16 on CPUs. Same arguments.

    As Caffe's, torch's alpha is divided by the size: AlexNet's paper, which does not divide, has 5e-4 here and k = 2.

    Shapes: x [N, C, ...] to the same, in x's dtype.
    Source: AlexNet (Krizhevsky et al. 2012, section 3.3).
    """

    def forward(self, x: Tensor) -> Tensor:
        """x / (k + alpha / size * sum of the squares of size channels around each) ** beta."""
        if x.element_size() < 4:
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)
