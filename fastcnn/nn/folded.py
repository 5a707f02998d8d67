"""The inference form of fused layers: BatchNorm folded into the weights, everything else decided beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.ops import Affine, Conv, activations, inference
from fastcnn.ops.layout import to_nhwc

Pair = tuple[int, int]


class _Geometry(NamedTuple):
    """A folded convolution without its tensors, named as fastcnn.ops.inference reads it."""

    op: str
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    act: int
    kernel: Pair


def _affine64(conv: Conv) -> tuple[Tensor | None, Tensor | None]:
    """The scale and shift that a convolution's normalisation is, in float64."""
    norm = conv.norm
    if norm is None:
        return None, None
    if isinstance(norm, Affine):
        return tuple(None if t is None else t.double() for t in norm)
    invstd = torch.rsqrt(norm.running_var.double() + norm.eps)
    scale = invstd if norm.weight is None else norm.weight.double() * invstd
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def fold(conv: Conv, dtype: torch.dtype | None = None) -> tuple[list[Tensor], Tensor | None]:
    """Weights with the normalisation's scale in the last one, and the shift: computed in float64, rounded once.

    Weights come in ``dtype`` (None: their own), the shift in float32 (float64 for float64 weights).
    """
    dtype = dtype or conv.weights[0].dtype
    scale, shift = _affine64(conv)
    weights = [w.detach().double() for w in conv.weights]
    if scale is not None:
        weights[-1] = weights[-1] * scale.detach().view(-1, 1, 1, 1)
    if shift is not None:
        shift = shift.detach().to(torch.float64 if dtype == torch.float64 else torch.float32)
    # clone: a weight that nothing scaled must not share memory with the model it comes from
    return [w.to(dtype).clone(memory_format=torch.contiguous_format) for w in weights], shift


def _least_size(geometries: Sequence[_Geometry], axis: int) -> int:
    """The fewest input pixels along one axis from which the chain makes a pixel."""
    size = 1
    for g in reversed(geometries):
        reach = g.dilation[axis] * (g.kernel[axis] - 1) + 1
        size = max(1, (size - 1) * g.stride[axis] + reach - 2 * g.padding[axis])
    return size


def _in_channels(conv: Conv) -> int:
    shape = conv.weights[0].shape
    if conv.op in ("depthwise", "separable") and conv.groups == 1:
        return shape[0]  # no depth multiplier, or the Conv would say in how many groups
    return shape[1] * conv.groups


class FoldedChain(nn.Module):
    """A chain of convolutions in inference form: act(conv(x, weight) + shift) each, plus a residual at the end.

    Holds each convolution's folded weights (``weight0``, ``weight0b`` for a separable one's second, ``weight1``, ...) and
    shifts (``shift0``, ...) as buffers, and calls the widest fused primitives. For inference only: no gradient passes.

    Args:
        convs: what `fastcnn.ops.conv_chain` takes; a BatchNorm must have running statistics.
        in_act: the activation before the first convolution.
        dtype: of the weights and of the input that `forward` takes; None keeps the weights' own.

    Shapes: x [N, K, H, W] in any memory format; the result and residual [N, C, P, Q], channels_last.
    """

    def __init__(self, convs: Sequence[Conv], in_act: str = "none", dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_act = activations.code(in_act)
        geometries = []
        for i, conv in enumerate(convs):
            weights, shift = fold(conv, dtype)
            self.register_buffer(f"weight{i}", weights[0])
            self.register_buffer(f"weight{i}b", weights[1] if len(weights) > 1 else None)
            self.register_buffer(f"shift{i}", shift)
            kernel = tuple(weights[0].shape[2:])
            where = (conv.stride, conv.padding, conv.dilation, conv.groups)
            geometries.append(_Geometry(conv.op, *where, activations.code(conv.act), kernel))
        self.geometries = tuple(geometries)
        self.in_channels = _in_channels(convs[0])
        self.least_size = (_least_size(geometries, 0), _least_size(geometries, 1))
        self._plan: list[inference.Step] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of the input that forward takes."""
        return self.weight0.dtype

    def _build(self) -> list[inference.Step]:
        """The primitives to call with their tensors: the one place where weights meet kernels."""
        buffers = self._buffers
        stages = range(len(self.geometries))
        weights = [(buffers[f"weight{i}"], buffers[f"weight{i}b"]) for i in stages]
        epilogues = [Affine(None, buffers[f"shift{i}"]) for i in stages]
        return inference.steps(self.geometries, weights, epilogues, self.in_act)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The chain's output, in the weights' dtype.

        Raises:
            ValueError: x has another rank or number of channels, or too few pixels.
        """
        shape = x.shape
        if len(shape) != 4 or shape[1] != self.in_channels or self._too_small(shape):
            self._reject(x)
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = to_nhwc(x)
        if residual is not None and not residual.is_contiguous(memory_format=torch.channels_last):
            residual = to_nhwc(residual)
        # Buffers are looked up once: nn.Module's __getattr__ for each would cost as much as a kernel launch.
        plan = self._plan
        if plan is None or torch.compiler.is_compiling():
            plan = self._build()
            if not torch.compiler.is_compiling():
                plan = self._plan = inference.pack(plan, self.dtype)
        return inference.run(x, plan, residual)

    def _too_small(self, shape: Sequence[int]) -> bool:
        return shape[2] < self.least_size[0] or shape[3] < self.least_size[1]

    def _reject(self, x: Tensor) -> None:
        h, w = self.least_size
        raise ValueError(
            f"x: got shape {list(x.shape)}, expected [N, {self.in_channels}, H, W] with H at least {h} and W at least {w}"
        )

    def _forget(self) -> None:
        self._plan = None

    def _apply(self, fn, recurse: bool = True):
        self._forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_plan": None}

    def extra_repr(self) -> str:
        """Channels, ops, activations and dtype."""
        steps = []
        for i, g in enumerate(self.geometries):
            weight = self._buffers[f"weight{i}b"]
            channels = (self._buffers[f"weight{i}"] if weight is None else weight).shape[0]
            kernel = "" if g.kernel == (1, 1) else f" {g.kernel[0]}x{g.kernel[1]}"
            stride = "" if g.stride == (1, 1) else f"/{g.stride[0]}"
            act = "" if g.act == activations.NONE else f" {activations.NAMES[g.act]}"
            steps.append(f"{g.op}{kernel}{stride} {channels}{act}")
        head = f"{activations.NAMES[self.in_act]}, " if self.in_act else ""
        return f"{self.in_channels} -> {head}{', '.join(steps)}, dtype={str(self.dtype).removeprefix('torch.')}"


class FoldedResidual(FoldedChain):
    """A FoldedChain that adds its own input to its output."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            self._reject(x)
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = to_nhwc(x)
        return super().forward(x, x)


class FoldedClassifier(nn.Module):
    """Global average pooling, then a linear layer as a pointwise convolution on [N, C, 1, 1]."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        norm = None if linear.bias is None else Affine(None, linear.bias)
        self.linear = FoldedChain([Conv("pointwise", (linear.weight[:, :, None, None],), norm=norm)], "none", dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, classes]."""
        return self.linear(F.adaptive_avg_pool2d(x, 1)).flatten(1)
