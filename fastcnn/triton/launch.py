"""What every launcher shares: where Triton can run, which device, how wide a channel vector is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from fastcnn.ops.layout import pixel_stride

# Read once, as triton.jit does: a kernel is interpreted or compiled from its decoration on.
INTERPRETED = triton.knobs.runtime.interpret

# Float32 products are float32 products whatever torch.backends.cudnn.allow_tf32 says (its default is True, and
# costs 1e-3): three TF32 products give 1e-6 on the tensor cores, and these layers wait for memory, not for them.
# AMD's matrix cores have no such mode.
PRECISION = "ieee" if torch.version.hip else "tf32x3"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MATRIX_PRODUCTS = frozenset(
    {
        "pointwise_fwd", "pointwise_into", "pointwise_bwd", "pointwise_bwd_into", "conv2d_fwd", "conv2d_into",
        "conv2d_dropout_into", "conv2d_bwd", "separable_fwd", "inverted_residual_fwd",
    }
)  # fmt: skip
# Where the input is in a primitive that takes the gradient, or what it writes to, first.
_INPUT = {
    "pointwise_bwd_into": 7,
    **dict.fromkeys(("pointwise_bwd", "conv2d_bwd", "depthwise_bwd"), 6),
    **dict.fromkeys(("affine_act_sums", "avg_pool2d_bwd", "capsule_routing_bwd", "squash_bwd"), 1),
    **dict.fromkeys(("local_response_norm_bwd", "affine_act_into", "pointwise_into", "conv2d_into"), 1),
    "conv2d_dropout_into": 1,
}

# Offsets within an image are 32-bit; images and rows of pixels start at 64-bit offsets.
MAX_IMAGE = 2**31

# A vector that squash holds in registers: 64 elements for each of 512 threads.
MAX_VECTOR = 2**15
# in_dim x out_dim, each rounded up to a power of two of at least 16: a capsule's W for one other is a single tile.
MAX_MATRIX = 2**12


def unavailable() -> str | None:
    """Why Triton kernels can run nowhere on this machine, or None."""
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "no GPU is visible to torch, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    return None


def _operands(primitive: str, args: Sequence) -> tuple[Tensor, Tensor]:
    """The input and what comes first: the gradient, the output that is given, or the input again."""
    return args[_INPUT.get(primitive, 0)], args[0]


def refuses(primitive: str, args: Sequence) -> str | None:
    """Why this backend will not run this call, or None."""
    x, grad = _operands(primitive, args)
    for name, t in (("input", x), ("gradient", grad)):
        if t.dtype not in DTYPES:
            return f"the triton backend computes in float32, bfloat16 and float16, and the {name} is {t.dtype}"
    if not x.is_cuda:
        if not INTERPRETED or x.device.type != "cpu":
            return f"the input is on {x.device.type}: Triton needs a GPU, or its interpreter (TRITON_INTERPRET=1)"
        if primitive in MATRIX_PRODUCTS and torch.bfloat16 in (x.dtype, grad.dtype):
            return "Triton's interpreter multiplies bfloat16 matrices wrongly"
    elif not INTERPRETED and x.dtype == torch.bfloat16 and _capability(x.get_device()) < (8, 0):
        return "bfloat16 needs compute capability 8.0"
    for t in (x, grad):
        if t.dim() == 4 and t.numel() > MAX_IMAGE and t.shape[2] * t.shape[3] * t.stride(3) >= MAX_IMAGE:
            return "a single image has 2^31 elements or more"
    return _too_large(primitive, args)


def _too_large(primitive: str, args: Sequence) -> str | None:
    """Why capsules do not fit a tile, or None."""
    if primitive in ("squash_fwd", "squash_bwd") and args[0].shape[-1] > MAX_VECTOR:
        return f"squash takes vectors of up to {MAX_VECTOR} elements here, and these have {args[0].shape[-1]}"
    if primitive in ("capsule_routing_fwd", "capsule_routing_bwd"):
        in_dim, out_dim = args[1 if primitive == "capsule_routing_fwd" else 2].shape[2:]
        if pow2(in_dim, 16, MAX_IMAGE) * pow2(out_dim, 16, MAX_IMAGE) > MAX_MATRIX:
            return f"in_dim x out_dim, both padded, may be {MAX_MATRIX} here, and they are {in_dim} and {out_dim}"
    return None


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return (9, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


def primitive(function: Callable) -> Callable:
    """Runs a primitive on its first argument's device, which Triton takes from torch's current one."""

    @functools.wraps(function)
    def run(*args):
        device = args[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return function(*args)
        return function(*args)

    return run


def nhwc(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x or its NHWC copy (a channel slice is NHWC too), and the elements from pixel to pixel; (None, 0) of None."""
    if x is None:
        return None, 0
    stride = pixel_stride(x)
    if stride is None or x.numel() == 0:
        return x.contiguous(memory_format=torch.channels_last), x.shape[1]
    return x, stride


def given(out: Tensor) -> int:
    """The elements from pixel to pixel of an output that the caller gave, for which no NHWC copy can stand in."""
    stride = pixel_stride(out)
    if stride is None:
        raise ValueError(f"out: got strides {list(out.stride())}, expected an NHWC tensor or a channel slice of one")
    return stride


def vector(*sizes: int) -> int:
    """The largest power of two up to 8 that divides every size: 16 bytes of half precision, what one load can take.

    Sizes go to the kernels in units of it, so that the compiler knows them divisible: Triton by itself looks for
    16 only, and MobileNet's 24 channels would be loaded one by one.
    """
    return math.gcd(8, *sizes)


def pow2(n: int, low: int, high: int) -> int:
    """The next power of two from n, within [low, high]."""
    return min(max(1 << (n - 1).bit_length(), low), high)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def empty(x: Tensor) -> Tensor:
    """What a result that was not asked for looks like."""
    return torch.empty(0, dtype=torch.float32, device=x.device)
