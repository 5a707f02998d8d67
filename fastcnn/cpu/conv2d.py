"""General convolution on the C++ matrix-product core: forward, and the weight gradient of a stem."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, epilogue, floats, pointer, statistics
from fastcnn.cpu.memory import empty_nhwc
from fastcnn.cpu.packing import PackedMatrix, packed_forward
from fastcnn.ops.layout import conv_out_size, pixel_stride, to_nhwc

Pair = tuple[int, int]

# A reduction up to this many elements is packed densely (a stem's 27 are not padded to 9 x 16); beyond it, taps are
# padded to whole vectors of the widest instruction set.
_DENSE_REDUCTION = 240
_VECTOR = 16


def tap_channels(channels: int, kernel: tuple[int, int]) -> int:
    """Channels between neighbouring taps of the reduction."""
    if channels * kernel[0] * kernel[1] <= _DENSE_REDUCTION:
        return channels
    return (channels + _VECTOR - 1) // _VECTOR * _VECTOR


def as_matrix(weight: Tensor) -> Tensor:
    """[n, k, r, s] as the [n, r * s * tap_channels, 1, 1] weight of the implicit product."""
    n, channels, *kernel = weight.shape
    taps = weight.detach().permute(0, 2, 3, 1)
    padding = tap_channels(channels, tuple(kernel)) - channels
    return F.pad(taps, (0, padding)).reshape(n, -1, 1, 1)


def _shape(x: Tensor, n: int, kernel, stride: Pair, padding: Pair, dilation: Pair) -> tuple:
    images, channels, h, w = x.shape
    out_h, out_w = (conv_out_size((h, w)[i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    taps = tap_channels(channels, tuple(kernel))
    return (
        images, channels, n, h, w, out_h, out_w, taps, *kernel, *stride, *padding, *dilation, DTYPE_CODES[x.dtype]
    )  # fmt: skip


def conv2d_fwd(
    x: Tensor,
    weight: Tensor | PackedMatrix,
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
    """As fastcnn.ops.conv2d.conv2d_fwd; groups is 1, the weight may be packed (by pack_conv2d)."""
    x = to_nhwc(x)
    residual = None if residual is None else to_nhwc(residual)
    in_scale, in_shift, out_scale, out_shift = map(floats, (in_scale, in_shift, out_scale, out_shift))
    n, _, *kernel = weight.shape
    shape = _shape(x, n, kernel, stride, padding, dilation)
    y = empty_nhwc(x.shape[0], n, shape[5], shape[6], like=x)
    mean, var = statistics(n, stats, x)
    packed = packed_forward(weight if isinstance(weight, PackedMatrix) else as_matrix(weight), x.dtype)
    native.module().conv2d_forward(
        shape, x.data_ptr(), pixel_stride(x), (pointer(in_scale), pointer(in_shift), in_act), packed.data_ptr(),
        epilogue(out_scale, out_shift, out_act, residual, y, mean if stats else None, var),
    )  # fmt: skip
    return y, mean, var


def pack_conv2d(weight: Tensor, dtype: torch.dtype) -> PackedMatrix:
    """Packs a weight [n, k, r, s] for conv2d_fwd in dtype."""
    return PackedMatrix(as_matrix(weight).flatten(1), weight.shape, dtype)


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
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    need_dx: bool,
    need_dw: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight gradient of fastcnn.ops.conv2d.conv2d_bwd; calls that want dx are refused (see fastcnn.cpu)."""
    grad, x = to_nhwc(grad), to_nhwc(x)
    y = None if y is None else to_nhwc(y)
    y_scale, y_shift, coef, x_scale, x_shift = map(floats, (y_scale, y_shift, coef, x_scale, x_shift))
    n, channels, *kernel = weight.shape
    shape = _shape(x, n, kernel, stride, padding, dilation)
    dw = torch.empty((n, *kernel, shape[7]), dtype=torch.float32)
    native.module().conv2d_weight_gradient(
        shape,
        (grad.data_ptr(), pixel_stride(grad), pointer(y), 0 if y is None else pixel_stride(y),
         pointer(y_scale), pointer(y_shift), y_act, pointer(coef)),
        x.data_ptr(), pixel_stride(x), (pointer(x_scale), pointer(x_shift), x_act), dw.data_ptr(),
    )  # fmt: skip
    empty = torch.empty(0, dtype=torch.float32)
    return grad.new_empty(0), dw[..., :channels].permute(0, 3, 1, 2).contiguous(), empty
