"""Calls that the cpu backend leaves to torch's own convolution (the unfused backend), because that was measured faster.

Ratios are times of the unfused backend over this one's, 2 cores, batch 1 and 8, of an AMD Zen 4 (bf16 dot products at
twice the float32 rate) and an Intel Emerald Rapids without AMX (at half of it: bf16 is widened here, in torch it is
slower than float32); for few channels of an Emerald Rapids with AMX and without, and an AMD Zen 3. They are no
statement about other processors and instruction sets, where everything stays here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.ops.layout import conv_out_sizes

Pair = tuple[int, int]
ISAS = ("avx512", "avx512_bf16")


class _Groups(NamedTuple):
    """Grouped convolutions that are faster unfused: from a width on, up to a size of the output, strided ones or not."""

    channels: int
    pixels: float = math.inf
    strided: bool = True

    def has(self, channels: int, pixels: int, stride: Pair) -> bool:
        """Whether a convolution is one of them."""
        return channels >= self.channels and pixels <= self.pixels and (self.strided or max(stride) == 1)

    def __str__(self) -> str:
        where = "" if self.pixels == math.inf else f" on outputs of at most {self.pixels} pixels"
        return f"groups of {self.channels} channels and more{where}"


# Images and other inputs of less than 8 channels, whose patches are copied here, for 32 outputs or with a stride, a
# training step: 0.45 to 1.0 from 10,000 output pixels on, all images together; below them 0.96 to 1.3. In bf16 on
# AMX, which copies none, 1.0 to 2.4.
_FEW_CHANNELS, _FEW_OUTPUTS, _MANY_PIXELS = 7, 32, 10_000


class _Rules(NamedTuple):
    groups: dict[torch.dtype, _Groups]
    depthwise_bytes: Pair | None  # of outputs with nothing to fuse, at least and at most
    few_channels: dict[str, tuple[torch.dtype, ...]]  # instruction sets and dtypes in which those are faster unfused


_RULES = {
    "AuthenticAMD": _Rules(
        {
            # ResNeXt's groups of 8 to 64: forward 0.56 to 1.28, in the mean 0.75; backward 0.40 to 0.86.
            torch.bfloat16: _Groups(8),
            # On maps of 7 x 7: 0.48 to 0.75; on 14 x 14 1.13 to 1.23. Lines of 7 pixels fill half a tile.
            torch.float32: _Groups(32, 49),
        },
        # MobileNet-v2's and Xception's: 0.27 to 1.09, mostly 0.6 to 0.95. Below, torch's call costs more than it saves;
        # above, malloc gives memory back to the system after each call and torch takes 2.5 to 3.4 times as long.
        (1536 << 10, 32 << 20),
        {"avx2": (torch.float32, torch.bfloat16)},
    ),
    "GenuineIntel": _Rules(
        {
            # 32 channels on 7 x 7: forward 0.73 to 1.10, backward 0.80 to 0.95; fewer: 0.77 to 3.8, in the mean 1.5.
            torch.bfloat16: _Groups(32, 49),
            # 16 on 14 x 14 and 32 on 7 x 7: forward 0.64 to 1.03, backward 0.63 to 0.83; with a stride 0.90 to 1.31.
            torch.float32: _Groups(16, 196, strided=False),
        },
        None,  # 0.76 to 1.8, in the mean 1.3
        {"avx512": (torch.float32, torch.bfloat16), "amx": (torch.float32,)},
    ),
}


@cache
def vendor() -> str:
    """The processor's vendor as CPUID names it; empty where Linux does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def faster_unfused(primitive: str, args: Sequence) -> str | None:
    """Why torch's convolution should run this call, or None."""
    rules = _RULES.get(vendor())
    if rules is None:
        return None
    if primitive == "conv2d_fwd":
        call = (*args[:2], *args[9:13])
    elif primitive == "conv2d_bwd":
        call = (args[6], args[11], *args[13:17])
    elif primitive == "depthwise_fwd" and not any(isinstance(a, Tensor) or a for a in (*args[2:9], args[12])):
        call = (*args[:2], *args[9:12])
    else:
        return None
    isa = native.module().isa_active()
    if primitive == "depthwise_fwd":
        return _plain_depthwise(rules, *call) if isa in ISAS else None
    reason = _few_channels(*call) if call[0].dtype in rules.few_channels.get(isa, ()) else None
    return _grouped(rules, *call) if reason is None and isa in ISAS else reason


def _output_pixels(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> int:
    """Of one image."""
    return math.prod(conv_out_sizes(x.shape[2:], weight.shape[2:], stride, padding, dilation))


def _grouped(
    rules: _Rules, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> str | None:
    faster = rules.groups.get(x.dtype)
    pixels = _output_pixels(x, weight, stride, padding, dilation)
    if groups == 1 or faster is None or not faster.has(weight.shape[1], pixels, stride):
        return None
    return f"{faster} in {str(x.dtype).removeprefix('torch.')} are measured faster there"


def _few_channels(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> str | None:
    if groups > 1 or weight.shape[1] > _FEW_CHANNELS or tuple(weight.shape[2:]) == (1, 1):
        return None
    if not isinstance(weight, Tensor) or not (weight.shape[0] <= _FEW_OUTPUTS or max(stride) > 1):
        return None  # a packed weight is an inference form's
    if x.shape[0] * _output_pixels(x, weight, stride, padding, dilation) < _MANY_PIXELS:
        return None
    return f"{_FEW_CHANNELS} channels and less to {_FEW_OUTPUTS} or with a stride are measured faster there"


def _plain_depthwise(
    rules: _Rules, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> str | None:
    if rules.depthwise_bytes is None or max(weight.shape[2:]) > 7:
        return None
    values = x.shape[0] * weight.shape[0] * _output_pixels(x, weight, stride, padding, dilation)
    least, most = rules.depthwise_bytes
    if not least <= values * x.element_size() <= most:
        return None
    return "depthwise outputs of 1.5 to 32 MiB with nothing to fuse are measured faster there"
