"""Local response normalisation as a drop-in for nn.LocalResponseNorm."""

from __future__ import annotations

from torch import Tensor, nn

from fastcnn.ops.local_response_norm import is_fused, local_response_norm


class LocalResponseNorm(nn.LocalResponseNorm):
    """nn.LocalResponseNorm on fastcnn's kernels, halves summed in float32; same arguments.

    As Caffe's, torch's alpha is divided by the size: AlexNet's paper, which does not divide, has 5e-4 here and k = 2.

    Shapes: x [N, C, ...] to the same, in x's dtype. What the kernels do not have (any but four dimensions, an alpha below 0,
    a k that is not above it) is torch's own, in float32 where x is a half, which torch refuses in bfloat16 on CPUs.
    Source: `fastcnn.ops.local_response_norm`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x / (k + alpha / size * sum of the squares of size channels around each) ** beta."""
        how = self.size, self.alpha, self.beta, self.k
        if is_fused(x, *how):
            return local_response_norm(x, *how)
        if x.element_size() < 4:
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)
