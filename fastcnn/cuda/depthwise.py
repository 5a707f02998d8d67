"""Depthwise convolution on CUDA: csrc/cuda/depthwise_fwd.cu and depthwise_bwd.cu."""

from __future__ import annotations

from torch import Tensor

from fastcnn.cuda.launch import DTYPES, Operands, address, floats, module, plan, stream
from fastcnn.ops.layout import empty_nhwc


def depthwise_fwd(
    x, weight, in_scale, in_shift, in_act, out_scale, out_shift, out_act, residual, stride, padding, dilation, stats
) -> tuple[Tensor, Tensor, Tensor]:
    """As fastcnn.ops.depthwise_conv2d.depthwise_fwd."""
    geometry, chosen, (p, q) = plan(
        "depthwise_fwd", x.device.index, x.dtype, tuple(x.shape), tuple(weight.shape), tuple(stride),
        tuple(padding), tuple(dilation),
    )  # fmt: skip
    c = weight.shape[0]
    y = empty_nhwc(x.shape[0], c, p, q, like=x)
    mean, var = floats(c if stats else 0, x), floats(c if stats else 0, x)
    workspace = floats(chosen.workspace if stats else 0, x)
    operands = Operands()
    module().depthwise_fwd(
        x.device.index, geometry, DTYPES[x.dtype], chosen, operands.view(x), operands.filter(weight, x.dtype),
        operands.affine(in_scale, in_shift, in_act), operands.affine(out_scale, out_shift, out_act),
        operands.view(residual), (y.data_ptr(), c), address(mean), address(var), address(workspace),
        stream(x.device),
    )  # fmt: skip
    return y, mean, var


def depthwise_bwd(
    grad, y, y_scale, y_shift, y_act, coef, x, x_scale, x_shift, x_act, x_mean, weight, stride, padding, dilation,
    need_dx, need_dw, need_sums,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As fastcnn.ops.depthwise_conv2d.depthwise_bwd."""
    need_sums = need_sums and need_dx
    geometry, chosen, _ = plan(
        "depthwise_bwd", x.device.index, x.dtype, tuple(x.shape), tuple(weight.shape), tuple(stride),
        tuple(padding), tuple(dilation),
    )  # fmt: skip
    dx = empty_nhwc(*x.shape, like=grad) if need_dx else grad.new_empty(0)
    dw = floats(weight.shape if need_dw else 0, x)
    sums = floats((2, x.shape[1]) if need_sums else 0, x)
    if not need_dx and not need_dw:
        return dx, dw, sums
    workspace = floats(chosen.workspace, x)
    operands = Operands()
    module().depthwise_bwd(
        x.device.index, geometry, DTYPES[x.dtype], chosen, operands.view(grad), operands.view(y),
        operands.affine(y_scale, y_shift, y_act), operands.floats(coef), operands.view(x),
        operands.affine(x_scale, x_shift, x_act), operands.floats(x_mean), operands.filter(weight, x.dtype),
        (address(dx), x.shape[1]), address(dw), address(sums), address(workspace), stream(x.device),
    )  # fmt: skip
    return dx, dw, sums
