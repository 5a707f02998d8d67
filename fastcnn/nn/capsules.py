"""Capsule layers: primary capsules on the convolution core, votes with routing in one kernel, the margin loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcnn import ops
from fastcnn.ops import Affine, Conv, conv_chain
from fastcnn.ops.layout import accumulation_dtype
from fastcnn.ops.validation import Labels, pair

Pair = tuple[int, int]


class PrimaryCaps(nn.Module):
    """A convolution whose output channels are capsules, then squash.

    Keys: ``conv.weight``, ``conv.bias``; output channel t * dim + a is coordinate a of type t.

    Args:
        in_channels, kernel_size, stride, padding: the convolution's.
        types: capsules at each pixel.
        dim: coordinates of a capsule.
        scale: factor of the convolution's products, before its bias. The authors' code sends these capsules through one
            step of routing, which multiplies them by 1 / types; the paper says nothing of it.

    Shapes: x [N, in_channels, H, W] in NCHW or NHWC memory; the result [N, types * P * Q, dim] in the order type, row,
    column. Dtypes: as `fastcnn.ops.conv2d`.
    Source: Sabour, Frosst & Hinton 2017 (arXiv 1710.09829), section 4.

    Raises:
        TypeError, ValueError: an input that does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        types: int = 32,
        dim: int = 8,
        kernel_size: int | Pair = 9,
        stride: int | Pair = 2,
        padding: int | Pair = 0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, types * dim, kernel_size, stride, padding)
        self.types, self.dim, self.scale = types, dim, scale

    def forward(self, x: Tensor) -> Tensor:
        """Capsules [N, types * P * Q, dim], shorter than 1."""
        conv = self.conv
        scale = None if self.scale == 1 else torch.full_like(conv.bias, self.scale)
        where = (pair(conv.stride, "stride", 1), pair(conv.padding, "padding", 0))
        y = conv_chain(x, (Conv("conv2d", (conv.weight,), *where, norm=Affine(scale, conv.bias)),), labels=(Labels(),))
        n, _, p, q = y.shape
        return ops.squash(y.view(n, self.types, self.dim, p, q).permute(0, 1, 3, 4, 2).reshape(n, -1, self.dim))

    def extra_repr(self) -> str:
        """Types, coordinates and scale."""
        return f"types={self.types}, dim={self.dim}, scale={self.scale:g}"


class CapsuleLinear(nn.Module):
    """Every input capsule votes for every output capsule through a matrix of its own; routing by agreement.

    Keys: ``weight`` [in_caps, out_caps, in_dim, out_dim] and, with a bias, ``bias`` [out_caps, out_dim].

    Args:
        in_caps, in_dim, out_caps, out_dim: capsules and their coordinates.
        iterations, detach, leaky: of `fastcnn.ops.capsule_votes_routing`.
        bias: whether one is added in every iteration, as in the authors' code; the paper has none.

    Shapes: u [N, in_caps, in_dim] to [N, out_caps, out_dim].
    Source: Sabour, Frosst & Hinton 2017 (arXiv 1710.09829), section 2; initial values are those of the authors' code.

    Raises:
        TypeError, ValueError: as `fastcnn.ops.capsule_votes_routing`.
    """

    def __init__(
        self,
        in_caps: int,
        in_dim: int,
        out_caps: int,
        out_dim: int,
        iterations: int = 3,
        bias: bool = True,
        detach: bool = False,
        leaky: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_caps, out_caps, in_dim, out_dim))
        self.bias = nn.Parameter(torch.empty(out_caps, out_dim)) if bias else None
        self.iterations, self.detach, self.leaky = iterations, detach, leaky
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from a normal distribution of deviation 0.1 cut at two deviations, biases of 0.1."""
        nn.init.trunc_normal_(self.weight, std=0.1, a=-0.2, b=0.2)
        if self.bias is not None:
            nn.init.constant_(self.bias, 0.1)

    def forward(self, u: Tensor) -> Tensor:
        """Output capsules [N, out_caps, out_dim], shorter than 1."""
        return ops.capsule_votes_routing(u, self.weight, self.iterations, self.bias, self.detach, self.leaky)

    def extra_repr(self) -> str:
        """Sizes and options."""
        in_caps, out_caps, in_dim, out_dim = self.weight.shape
        options = (
            f"iterations={self.iterations}, bias={self.bias is not None}, detach={self.detach}, leaky={self.leaky}"
        )
        return f"{in_caps} x {in_dim} -> {out_caps} x {out_dim}, {options}"


class MarginLoss(nn.Module):
    """Sum over the classes of T max(0, m+ - |v|)^2 + weight (1 - T) max(0, |v| - m-)^2, the mean over the batch.

    Args:
        positive, negative: the margins m+ and m-.
        weight: of absent classes.
        factor: of the whole; the authors' code halves both terms.

    Shapes: capsules [N, classes, dim] or their lengths [N, classes]; target [N] of class indices, or [N, classes] of 0 and
    1 for images with several digits. The result is a scalar in float32, or float64 for float64 capsules.
    Source: Sabour, Frosst & Hinton 2017 (arXiv 1710.09829), equation 4.

    Raises:
        ValueError: shapes that do not fit.
    """

    def __init__(self, positive: float = 0.9, negative: float = 0.1, weight: float = 0.5, factor: float = 1.0) -> None:
        super().__init__()
        self.positive, self.negative, self.weight, self.factor = positive, negative, weight, factor

    def forward(self, capsules: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        if capsules.dim() not in (2, 3):
            raise ValueError(f"capsules: got shape {list(capsules.shape)}, expected [N, classes, dim] or [N, classes]")
        lengths = capsules.to(accumulation_dtype(capsules))
        lengths = lengths.norm(dim=-1) if capsules.dim() == 3 else lengths
        if target.shape not in (lengths.shape[:1], lengths.shape):
            raise ValueError(
                f"target: got shape {list(target.shape)}, expected {list(lengths.shape[:1])} or {list(lengths.shape)}"
            )
        if target.dim() == 1:
            target = nn.functional.one_hot(target, lengths.shape[1])
        present = target.to(lengths.dtype)
        loss = present * (self.positive - lengths).relu().square()
        loss = loss + self.weight * (1 - present) * (lengths - self.negative).relu().square()
        return self.factor * loss.sum(1).mean()

    def extra_repr(self) -> str:
        """Margins, weight and factor."""
        return f"positive={self.positive}, negative={self.negative}, weight={self.weight}, factor={self.factor}"
