"""General convolution on the C++ matrix-product core."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, backward_output, epilogue, floats, pointer, statistics
from fastcnn.cpu.memory import empty_nhwc
from fastcnn.cpu.packing import PackedWeight, source
from fastcnn.ops.dropout import ELEMENT, threshold
from fastcnn.ops.layout import conv_out_sizes, pixel_stride, to_nhwc
from fastcnn.ops.registry import Mutable
from fastcnn.ops.stages import STORE

Pair = tuple[int, int]
_ONE = (1, 1)


def weight_layout(weight: Tensor) -> tuple:
    """A Conv2dWeight: data, dtype and the strides of any memory format."""
    return weight.data_ptr(), DTYPE_CODES[weight.dtype], *weight.stride()


def _pack(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    module, weight = native.module(), source(weight)
    n, channels, *kernel = weight.shape
    shape = (1, channels * groups, n, 1, 1, 1, 1, groups, *kernel, *_ONE, 0, 0, *_ONE, DTYPE_CODES[dtype])
    data = torch.empty(module.conv2d_packed_bytes(shape), dtype=torch.uint8)
    module.conv2d_pack(shape, weight_layout(weight), data.data_ptr())
    return data


def pack_conv2d(weight: Tensor, dtype: torch.dtype, groups: int) -> PackedWeight:
    """Packs a weight [n, k / groups, r, s] for conv2d_fwd in dtype."""
    return PackedWeight(partial(_pack, weight, groups, dtype), weight.shape, dtype)


def _shape(x: Tensor, n: int, kernel, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> tuple:
    images, channels, h, w = x.shape
    out_h, out_w = conv_out_sizes((h, w), kernel, stride, padding, dilation)
    return (
        images, channels, n, h, w, out_h, out_w, groups, *kernel, *stride, *padding, *dilation, DTYPE_CODES[x.dtype]
    )  # fmt: skip


def _forward(
    out: Tensor, x: Tensor, weight: Tensor | PackedWeight, head: tuple, tail: tuple, where: tuple, mask: tuple | None,
    stats: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The convolution into ``out``, with a DropoutMask or None. Returns mean, var."""
    (in_scale, in_shift, in_act), (out_scale, out_shift, out_act, residual) = head, tail
    x = to_nhwc(x)
    residual = None if residual is None else to_nhwc(residual)
    in_scale, in_shift, out_scale, out_shift = map(floats, (in_scale, in_shift, out_scale, out_shift))
    n, _, *kernel = weight.shape
    mean, var = statistics(n, stats, x)
    packed = weight.bytes() if isinstance(weight, PackedWeight) else _pack(weight, where[-1], x.dtype)
    native.module().conv2d_forward(
        _shape(x, n, kernel, *where), x.data_ptr(), pixel_stride(x), (pointer(in_scale), pointer(in_shift), in_act),
        packed.data_ptr(), epilogue(out_scale, out_shift, out_act, residual, out, mean if stats else None, var), mask,
    )  # fmt: skip
    return mean, var


def conv2d_fwd(
    x: Tensor,
    weight: Tensor | PackedWeight,
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
    """As fastcnn.ops.conv2d.conv2d_fwd; the weight may be packed (by pack_conv2d)."""
    n, _, *kernel = weight.shape
    size = conv_out_sizes(x.shape[2:], kernel, stride, padding, dilation)
    y = empty_nhwc(x.shape[0], n, *size, like=x)
    mean, var = conv2d_into(
        y, x, weight, in_scale, in_shift, in_act, out_scale, out_shift, out_act, residual,
        stride, padding, dilation, groups, stats,
    )  # fmt: skip
    return y, mean, var


def conv2d_into(
    out: Mutable,
    x: Tensor,
    weight: Tensor | PackedWeight,
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
    """As fastcnn.ops.conv2d.conv2d_into; the weight may be packed (by pack_conv2d)."""
    tail = out_scale, out_shift, out_act, residual
    return _forward(
        out, x, weight, (in_scale, in_shift, in_act), tail, (stride, padding, dilation, groups), None, stats
    )


def conv2d_dropout_into(
    out: Mutable,
    x: Tensor,
    weight: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_act: int,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    p: float,
    scale: float,
    seed: Tensor,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    """As fastcnn.ops.conv2d_dropout.conv2d_dropout_into."""
    n, c, h, w = out.shape
    mask = (n * h * w, c, h * w, ELEMENT, threshold(p), scale, seed.data_ptr())
    return _forward(out, x, weight, (in_scale, in_shift, in_act), STORE, (stride, padding, dilation, 1), mask, stats)


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
    """As fastcnn.ops.conv2d.conv2d_bwd; dw has the weight's memory format."""
    grad, x = to_nhwc(grad), to_nhwc(x)
    y, residual = (None if t is None else to_nhwc(t) for t in (y, residual))
    vectors = [floats(v) for v in (y_scale, y_shift, coef, x_scale, x_shift, x_mean)]
    y_scale, y_shift, coef, x_scale, x_shift, x_mean = vectors
    weight = source(weight)
    n, _, *kernel = weight.shape
    shape = _shape(x, n, kernel, stride, padding, dilation, groups)
    dx = empty_nhwc(*x.shape, like=grad) if need_dx else grad.new_empty(0)
    dw = torch.empty_like(weight, dtype=torch.float32) if need_dw else torch.empty((0, 0, 0, 0), dtype=torch.float32)
    sums = torch.empty((2, x.shape[1]) if need_sums else (0,), dtype=torch.float32)
    native.module().conv2d_backward(
        shape,
        (grad.data_ptr(), pixel_stride(grad), pointer(y), 0 if y is None else pixel_stride(y),
         pointer(y_scale), pointer(y_shift), y_act, pointer(coef)),
        (x.data_ptr(), pixel_stride(x), pointer(x_scale), pointer(x_shift), x_act, pointer(x_mean)),
        weight_layout(weight),
        backward_output(dx if need_dx else None, dw if need_dw else None, sums if need_sums else None, residual),
        weight_layout(dw),
    )  # fmt: skip
    return dx, dw if need_dw else dw.flatten(), sums
