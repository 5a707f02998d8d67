"""The fused depthwise-separable forward on CUDA: csrc/cuda/separable_fwd.cuh."""

from __future__ import annotations

from torch import Tensor

from fastcnn.cuda.launch import DTYPES, Operands, address, floats, module, plan, stream
from fastcnn.ops.layout import empty_nhwc


def separable_fwd(
    x, dw_weight, pw_weight, in_scale, in_shift, in_act, mid_scale, mid_shift, mid_act, out_scale, out_shift, out_act,
    residual, stride, padding, dilation, stats,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As fastcnn.ops.separable_conv2d.separable_fwd."""
    channels = pw_weight.shape[0]
    geometry, chosen, (p, q) = plan(
        "separable_fwd", x.device.index, x.dtype, tuple(x.shape), tuple(dw_weight.shape), tuple(stride),
        tuple(padding), tuple(dilation), channels,
    )  # fmt: skip
    y = empty_nhwc(x.shape[0], channels, p, q, like=x)
    mean, var = floats(channels if stats else 0, x), floats(channels if stats else 0, x)
    workspace = floats(chosen.workspace if stats else 0, x)
    operands = Operands()
    module().separable_fwd(
        x.device.index, geometry, channels, DTYPES[x.dtype], chosen, operands.view(x),
        operands.filter(dw_weight, x.dtype), operands.dense(pw_weight, x.dtype),
        operands.affine(in_scale, in_shift, in_act), operands.affine(mid_scale, mid_shift, mid_act),
        operands.affine(out_scale, out_shift, out_act), operands.view(residual), (y.data_ptr(), channels),
        address(mean), address(var), address(workspace), stream(x.device),
    )  # fmt: skip
    return y, mean, var
