"""The inference form of fused layers: BatchNorm folded into the weights, everything else decided beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.ops import Affine, BatchNorm, Conv, activations, inference
from fastcnn.ops.channel_join import is_traced
from fastcnn.ops.layout import conv_out_sizes, to_nhwc, versions
from fastcnn.ops.validation import kernel_of

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


def _norm64(norm: Affine | BatchNorm | None) -> tuple[Tensor | None, Tensor | None]:
    """The scale and shift that a normalisation is, in float64."""
    if norm is None:
        return None, None
    if isinstance(norm, Affine):
        return tuple(None if t is None else t.double() for t in norm)
    invstd = torch.rsqrt(norm.running_var.double() + norm.eps)
    scale = invstd if norm.weight is None else norm.weight.double() * invstd
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _affine64(conv: Conv) -> tuple[Tensor | None, Tensor | None]:
    """The scale and shift that a convolution's bias and normalisation are, in float64."""
    scale, shift = _norm64(conv.norm)
    if conv.bias is None:
        return scale, shift
    bias = conv.bias.double() if scale is None else conv.bias.double() * scale
    return scale, bias if shift is None else shift + bias


def _vector_dtype(conv: Conv, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of scales and shifts beside weights of dtype (None: the convolution's own)."""
    return torch.float64 if (dtype or conv.weights[0].dtype) == torch.float64 else torch.float32


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
        shift = shift.detach().to(_vector_dtype(conv, dtype))
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


def folding_of(module: nn.Module) -> Callable[[torch.dtype | None], nn.Module | None] | None:
    """The module's `folded`, unless a subclass overrides forward beneath it: then it folds another computation."""
    for cls in type(module).__mro__:
        if "folded" in cls.__dict__:
            return module.folded
        if "forward" in cls.__dict__:
            return None
    return None


class FoldedChain(nn.Module):
    """A chain of convolutions in inference form: act(conv(x, weight) + shift) each, plus a residual at the end.

    Holds each convolution's folded weights (``weight0``, ``weight0b`` for a separable one's second, ``weight1``, ...) and
    shifts (``shift0``, ...) as buffers, and calls the widest fused primitives. A first identity's normalisation (a
    pre-activation) stays a scale and a shift, ``in_scale`` and ``in_shift``. For inference only: no gradient passes.

    Args:
        convs: what `fastcnn.ops.conv_chain` takes; a BatchNorm must have running statistics.
        in_act: the activation before the first convolution.
        dtype: of the weights and of the input that `forward` takes; None keeps the weights' own.
        act_after_residual: whether the last activation comes after the residual.

    Shapes: x [N, K, H, W] in any memory format; the result and residual [N, C, P, Q], channels_last.
    """

    def __init__(
        self,
        convs: Sequence[Conv],
        in_act: str = "none",
        dtype: torch.dtype | None = None,
        act_after_residual: bool = False,
    ) -> None:
        super().__init__()
        pre, convs = (convs[0], convs[1:]) if convs[0].op == "identity" else (Conv("identity", act=in_act), convs)
        weighted = next(conv for conv in convs if conv.weights)
        for name, value in zip(("in_scale", "in_shift"), _affine64(pre)):
            self.register_buffer(name, None if value is None else value.detach().to(_vector_dtype(weighted, dtype)))
        self.in_act = activations.code(pre.act)
        geometries = []
        for i, conv in enumerate(convs):
            weights, shift = fold(conv, dtype) if conv.weights else ([None], None)
            self.register_buffer(f"weight{i}", weights[0])
            self.register_buffer(f"weight{i}b", weights[1] if len(weights) > 1 else None)
            self.register_buffer(f"shift{i}", shift)
            where = (conv.stride, conv.padding, conv.dilation, conv.groups)
            geometries.append(_Geometry(conv.op, *where, activations.code(conv.act), kernel_of(conv)))
        if act_after_residual:
            geometries[-1] = geometries[-1]._replace(act=geometries[-1].act + activations.AFTER_RESIDUAL)
        self.geometries = tuple(geometries)
        self.in_channels = _in_channels(weighted)
        self.least_size = (_least_size(geometries, 0), _least_size(geometries, 1))
        self._plan: list[inference.Step] | None = None
        self._versions: list[tuple[int, int]] = []  # of the buffers that the plan was made of

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of the input that forward takes."""
        return next(b.dtype for name, b in self._buffers.items() if name.startswith("weight") and b is not None)

    def _build(self) -> list[inference.Step]:
        """The primitives to call with their tensors: the one place where weights meet kernels."""
        buffers = self._buffers
        stages = range(len(self.geometries))
        weights = [(buffers[f"weight{i}"], buffers[f"weight{i}b"]) for i in stages]
        epilogues = [Affine(None, buffers[f"shift{i}"]) for i in stages]
        head = (buffers["in_scale"], buffers["in_shift"], self.in_act)
        return inference.steps(self.geometries, weights, epilogues, head)

    def forward(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The chain's output, in the weights' dtype; with ``out``, a channel slice of an NHWC buffer, it is written there.

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
        traced = is_traced(x)
        plan = self._plan
        now = [] if traced else versions(b for b in self._buffers.values() if b is not None)
        if traced or plan is None or now != self._versions:
            plan = self._build()
            if not traced:
                plan = self._plan = inference.pack(plan, self.dtype)
                self._versions = now
        return inference.run(x, plan, residual, out)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The output's [N, C, P, Q] for an input's [N, K, H, W]."""
        n, _, *size = shape
        for g in self.geometries:
            size = conv_out_sizes(size, g.kernel, g.stride, g.padding, g.dilation)
        last = len(self.geometries) - 1
        weight = self._buffers[f"weight{last}b"]
        return n, (self._buffers[f"weight{last}"] if weight is None else weight).shape[0], *size

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
            weights = (self._buffers[f"weight{i}b"], self._buffers[f"weight{i}"])
            channels = next((f" {w.shape[0]}" for w in weights if w is not None), "")
            kernel = "" if g.kernel == (1, 1) else f" {g.kernel[0]}x{g.kernel[1]}"
            stride = "" if g.stride == (1, 1) else f"/{g.stride[0]}"
            after = g.act & activations.AFTER_RESIDUAL
            name = activations.NAMES[g.act - after]
            act = "" if name == "none" else f" {'+ residual ' if after else ''}{name}"
            steps.append(f"{g.op}{kernel}{stride}{channels}{act}")
        norm = "" if self.in_scale is None and self.in_shift is None else "norm "
        head = f"{norm}{activations.NAMES[self.in_act]}, " if norm or self.in_act else ""
        return f"{self.in_channels} -> {head}{', '.join(steps)}, dtype={str(self.dtype).removeprefix('torch.')}"


class FoldedResidual(FoldedChain):
    """A FoldedChain that adds its own input, or what ``shortcut`` makes of it, to its output.

    Args:
        convs, in_act, dtype, act_after_residual: as FoldedChain takes them.
        shortcut: a module from the chain's input to the shape of its output; None: the identity.
    """

    def __init__(
        self,
        convs: Sequence[Conv],
        in_act: str = "none",
        dtype: torch.dtype | None = None,
        act_after_residual: bool = False,
        shortcut: nn.Module | None = None,
    ) -> None:
        super().__init__(convs, in_act, dtype, act_after_residual)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            self._reject(x)
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = to_nhwc(x)
        return super().forward(x, x if self.shortcut is None else self.shortcut(x))


class FoldedActivation(nn.Module):
    """A normalisation and an activation without a convolution: act(scale * x + shift). For inference only."""

    def __init__(self, pre: Conv, dtype: torch.dtype | None = None) -> None:
        """pre is what `conv_chain` takes as an "identity"; dtype is the input's, None the statistics' own."""
        super().__init__()
        own = pre.norm.running_mean.dtype if isinstance(pre.norm, BatchNorm) else torch.float32
        vector = torch.float64 if (dtype or own) == torch.float64 else torch.float32
        for name, value in zip(("scale", "shift"), _affine64(pre)):
            self.register_buffer(name, None if value is None else value.detach().to(vector))
        self.act = activations.code(pre.act)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], in x's dtype and channels_last."""
        return torch.ops.fastcnn.affine_act_fwd(x, self.scale, self.shift, self.act, None)


class FoldedClassifier(nn.Module):
    """Global average pooling, then a linear layer as a pointwise convolution on [N, C, 1, 1]."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        conv = Conv("pointwise", (linear.weight[:, :, None, None],), bias=linear.bias)
        self.linear = FoldedChain([conv], dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, classes]."""
        return self.linear(F.adaptive_avg_pool2d(x, 1)).flatten(1)
