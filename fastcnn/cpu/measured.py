"""Calls that the cpu backend leaves to torch's own convolution (the unfused backend), because that was measured faster.

Ratios are times of the unfused backend over this one's, 2 cores of a Zen 4 (AVX-512, bf16 dot products), batch 1 and 8.
They are no statement about other instruction sets, where everything stays here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.ops.layout import conv_out_size

Pair = tuple[int, int]
ISAS = ("avx512", "avx512_bf16")
# Plain depthwise outputs of MobileNet-v2 and Xception: 0.27 to 1.09, mostly 0.6 to 0.95. Below, torch's call costs more
# than it saves; above, malloc gives memory back to the system after each call and torch takes 2.5 to 3.4 times as long.
PLAIN_DEPTHWISE_BYTES = (1536 << 10, 32 << 20)


def faster_unfused(primitive: str, args: Sequence) -> str | None:
    """Why torch's convolution should run this call, or None."""
    if primitive == "conv2d_fwd":
        reason = _grouped(*args[:2], *args[9:13])
    elif primitive == "conv2d_bwd":
        reason = _grouped(args[6], *args[11:16])
    elif primitive == "depthwise_fwd" and not any(isinstance(a, Tensor) or a for a in (*args[2:9], args[12])):
        reason = _plain_depthwise(*args[:2], *args[9:12])
    else:
        return None
    return reason if reason and native.module().isa_active() in ISAS else None


def _output_pixels(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> int:
    """Of one image."""
    sizes = (conv_out_size(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    return math.prod(sizes)


def _grouped(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> str | None:
    width = weight.shape[1]
    if groups == 1 or width < 8:
        return None
    if x.dtype is torch.bfloat16:
        # ResNeXt's groups of 8 to 64: forward 0.56 to 1.28, in the mean 0.75; backward 0.40 to 0.86.
        return "groups of 8 channels and more in bfloat16 are measured faster there"
    # Groups of 32 and 64 on maps of 7 x 7: 0.48 to 0.75; on 14 x 14 1.13 to 1.23. Lines of 7 pixels fill half a tile.
    if width >= 32 and _output_pixels(x, weight, stride, padding, dilation) <= 49:
        return "groups of 32 channels and more on small maps are measured faster there"
    return None


def _plain_depthwise(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> str | None:
    values = x.shape[0] * weight.shape[0] * _output_pixels(x, weight, stride, padding, dilation)
    least, most = PLAIN_DEPTHWISE_BYTES
    if max(weight.shape[2:]) > 7 or not least <= values * x.element_size() <= most:
        return None
    return "depthwise outputs of 1.5 to 32 MiB with nothing to fuse are measured faster there"
