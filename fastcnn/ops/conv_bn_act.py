"""Convolution, BatchNorm and activation in either order: what most networks are made of."""

from __future__ import annotations

from torch import Tensor

from fastcnn.ops.conv_chain import conv_chain
from fastcnn.ops.normalisation import Affine, BatchNorm
from fastcnn.ops.stages import Conv, Pair
from fastcnn.ops.validation import MAX_DEPTHWISE_KERNEL, Labels, check_choice, pair

ORDERS = ("conv_bn_act", "bn_act_conv")

# The convolution's own parts, and those of a normalisation before it.
_LABELS = Labels(norm="norm", shift="shift")
_PLAIN = Labels()


def narrowest_op(channels: int, kernel: Pair, padding: Pair, groups: int) -> str:
    """The op of conv_chain that computes a convolution of ``channels`` input channels and does nothing else."""
    if groups == 1:
        return "pointwise" if kernel == (1, 1) and padding == (0, 0) else "conv2d"
    odd = all(k % 2 for k in kernel) and max(kernel) <= MAX_DEPTHWISE_KERNEL
    return "depthwise" if groups == channels and odd else "conv2d"


def _op_of(x: Tensor, weight: Tensor, padding: Pair, groups: int) -> str:
    """The narrowest op; what cannot be a convolution is left to the checks of the general one."""
    shaped = isinstance(x, Tensor) and isinstance(weight, Tensor) and x.dim() == weight.dim() == 4
    return narrowest_op(x.shape[1], tuple(weight.shape[2:]), padding, groups) if shaped else "conv2d"


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: BatchNorm | Affine | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    act: str = "none",
    order: str = "conv_bn_act",
    residual: Tensor | None = None,
    act_after_residual: bool = False,
) -> Tensor:
    """Any 2-D convolution with its bias, normalisation, activation and residual as one fused, differentiable unit.

    With ``order="conv_bn_act"``: y = act(norm(conv(x) + bias)) + residual, or with ``act_after_residual``
    y = act(norm(conv(x) + bias) + residual). With ``order="bn_act_conv"``: y = conv(act(norm(x))) + bias + residual.

    Batch statistics of the convolution's output are taken as it is stored, those of x in a pass over it; the running
    ones are updated in place. A bias before batch statistics only moves the running mean; its gradient is zero.

    Shapes: x [N, K, H, W] in any memory format, weight [C, K / groups, R, S], bias [C], norm of C channels or, before
    the convolution, of K; the result and residual [N, C, P, Q], the result in channels_last.
    Dtypes: float32, bfloat16, float16, float64 (reference); half inputs also take float32 parameters.
    Activations: none, relu, relu6, silu, hardswish; after the residual none, relu, relu6.
    Source: ResNet (arXiv 1512.03385, section 3.4), its pre-activation (arXiv 1603.05027, section 4).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device, an unknown activation or order,
            ``act_after_residual`` with the activation before the convolution, batch statistics of one value.
    """
    check_choice(order, "order", ORDERS)
    stride, padding, dilation = pair(stride, "stride", 1), pair(padding, "padding", 0), pair(dilation, "dilation", 1)
    where = (_op_of(x, weight, padding, groups), (weight,), stride, padding, dilation, groups)
    if order == "conv_bn_act":
        return conv_chain(
            x,
            (Conv(*where, norm, act, bias),),
            residual=residual,
            labels=(_LABELS,),
            act_after_residual=act_after_residual,
        )
    if act_after_residual:
        raise ValueError("act_after_residual: got True with order='bn_act_conv', expected False")
    convs = (Conv("identity", norm=norm, act=act), Conv(*where, bias=bias))
    return conv_chain(x, convs, residual=residual, labels=(_LABELS, _PLAIN))
