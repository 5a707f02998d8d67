"""The general convolution (stems, k x k): forward and backward with prologue and epilogue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn.ops import activations
from fastcnn.ops.conv_chain import conv_chain
from fastcnn.ops.fakes import convolution_backward_fake, convolution_fake, convolution_into_fake
from fastcnn.ops.layout import accumulation_dtype
from fastcnn.ops.prologue_epilogue import affine, epilogue, gradient_prologue, gradient_sums, prologue
from fastcnn.ops.registry import Mutable, Pair, register
from fastcnn.ops.stages import Conv
from fastcnn.ops.validation import HALVES, Labels, pair


def _forward_fake(x, weight, *rest):
    stride, padding, dilation, _groups, stats = rest[-5:]
    return convolution_fake(x, weight, stride, padding, dilation, stats)


def _backward_fake(grad, y, y_scale, y_shift, y_act, coef, x, x_scale, x_shift, x_act, x_mean, weight, *rest):
    return convolution_backward_fake(grad, x, weight, *rest[-3:])


def _core_dtype(x: Tensor) -> torch.dtype:
    """What the reference multiplies in: on CPUs torch's half convolutions can take minutes (bf16, 31x31 depthwise)."""
    return torch.float32 if x.device.type == "cpu" and x.dtype in HALVES else x.dtype


@register(_forward_fake)
def conv2d_fwd(
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    out_act: int,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Any convolution with prologue and epilogue; weight [C, K / groups, R, S]. Returns y, mean, var."""
    a = prologue(x, in_scale, in_shift, in_act)
    core = _core_dtype(x)
    y = F.conv2d(a.to(core), weight.to(a.dtype).to(core), None, stride, padding, dilation, groups).to(x.dtype)
    return epilogue(y, out_scale, out_shift, out_act, residual, stats)


@register(convolution_into_fake)
def conv2d_into(
    out: Mutable,
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    out_act: int,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    """conv2d_fwd with its output written to ``out``, a channel slice of an NHWC buffer that x may be another slice of.

    Returns mean, var.
    """
    y, mean, var = conv2d_fwd(
        x, weight, in_scale, in_shift, in_act, out_scale, out_shift, out_act, residual,
        stride, padding, dilation, groups, stats,
    )  # fmt: skip
    out.copy_(y)
    return mean, var


@register(_backward_fake)
def conv2d_bwd(
    grad: Tensor,
    y: Tensor | None,
    y_scale: Tensor | None,
    y_shift: Tensor | None,
    y_act: int,
    coef: Tensor | None,
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_act: int,
    x_mean: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    need_dx: bool,
    need_dw: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of conv2d_fwd. Returns dx, to which residual is added after its sums are taken, dw, sums."""
    acc = accumulation_dtype(x)
    dy = gradient_prologue(grad, y, y_scale, y_shift, y_act, coef)
    a = prologue(x, x_scale, x_shift, x_act)
    core = _core_dtype(x)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy.to(core), a.to(core), weight.to(a.dtype).to(core), None, stride, padding, dilation, False, [0, 0], groups,
        [need_dx, need_dw, False],
    )  # fmt: skip
    empty = torch.empty(0, dtype=acc, device=x.device)
    dw = dw.to(acc).contiguous() if need_dw else empty
    if not need_dx:
        return grad.new_empty(0), dw, empty
    dx = dx.to(acc)
    if x_act != activations.NONE:
        dx = dx * activations.derivative(affine(x, x_scale, x_shift), x_act)
    sums = gradient_sums(dx, x, x_mean) if need_sums else empty  # before rounding: what cancels has no digits to spare
    dx = dx if residual is None else dx + residual
    return dx.to(grad.dtype).contiguous(memory_format=torch.channels_last), dw, sums


_LABELS = (Labels(),)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Any 2-D convolution, differentiable: torch.nn.functional.conv2d on fastcnn's kernels.

    Shapes: x [N, K, H, W] in any memory format, weight [C, K / groups, R, S], bias [C]; the result [N, C, P, Q] is
    channels_last. Dtypes: float32, bfloat16, float16, float64 (reference); half inputs also take float32 parameters.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
    """
    where = (pair(stride, "stride", 1), pair(padding, "padding", 0), pair(dilation, "dilation", 1))
    return conv_chain(x, (Conv("conv2d", (weight,), *where, groups, bias=bias),), labels=_LABELS)
