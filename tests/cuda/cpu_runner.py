"""The cuda backend's primitives on the CPU stand-in: same arguments and results, run by the sanitised driver."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fastcnn.ops.dropout import mask_of, threshold
from fastcnn.ops.layout import conv_out_sizes, pixel_stride
from tests.cuda.cases import Shape, output_size
from tests.cuda.toolchain import build_driver

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A small GPU, so that blocks visit several tiles and several blocks share a reduction.
MULTIPROCESSORS = 1
SHARED_BYTES = 163 * 1024


def empty_nhwc(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """A channels_last tensor of NaN."""
    return torch.full((n, c, h, w), float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)


def _storage(t: Tensor) -> bytearray:
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return bytearray(whole.contiguous().view(torch.uint8).numpy().tobytes())


# In driver.cpp's order.
_PRIMITIVES = (
    "depthwise_fwd", "depthwise_bwd", "separable_fwd", "dropout_fwd", "dropout_bwd", "capsule_routing_fwd",
    "capsule_routing_bwd",
)  # fmt: skip
_PLAN_ONLY = 10
_NO_FIT = "no tile of this shape"


def _drive(case: bytes) -> tuple[bytes, str]:
    """The result's bytes and what the driver printed."""
    with tempfile.TemporaryDirectory() as directory:
        path, result = Path(directory, "case"), Path(directory, "result")
        path.write_bytes(case)
        process = subprocess.run(
            [build_driver(), path, result], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"}
        )
        if process.returncode:
            raise RuntimeError(f"driver: {process.stderr[:4000]}")
        return result.read_bytes(), process.stdout


def planned_shared_bytes(primitive: str, shape: Shape, shared_bytes: int) -> int | None:
    """What the planner takes of a device's shared memory for a shape; None where no tile fits."""
    c, (r, s) = shape.k * shape.multiplier, shape.kernel
    p, q = output_size(shape)
    geometry = [shape.n, shape.h, shape.w, shape.k, p, q, c, r, s, *shape.stride, *shape.padding, *shape.dilation]
    return _planned(primitive, shape.dtype, shared_bytes, [*geometry, shape.channels])


def planned_capsule_bytes(primitive: str, sizes: tuple[int, ...], shared_bytes: int) -> int | None:
    """The same for capsules: batch, in_caps, in_dim, out_caps, out_dim, iterations."""
    return _planned(primitive, torch.float32, shared_bytes, [*sizes, 0, 0])


def _planned(primitive: str, dtype: torch.dtype, shared_bytes: int, shape: list[int]) -> int | None:
    numbers = [_PLAN_ONLY + _PRIMITIVES.index(primitive), DTYPES.index(dtype), 132, shared_bytes, *shape]
    try:
        return int(_drive(struct.pack(f"<{len(numbers) + 2}q", len(numbers), *numbers, 0))[1])
    except RuntimeError as error:
        if _NO_FIT in str(error):
            return None
        raise


class Case:
    """Numbers and buffers in the order in which driver.cpp takes them."""

    def __init__(self, op: int, x: Tensor, geometry: list[int]):
        self.numbers = [op, DTYPES.index(x.dtype), MULTIPROCESSORS, SHARED_BYTES, *geometry]
        self.buffers: list[tuple[Tensor | None, int]] = []

    def flat(self, *tensors: Tensor | None) -> None:
        """Contiguous operands; None is a null pointer."""
        self.buffers += [(None if t is None else t.contiguous(), 0) for t in tensors]

    def dense(self, t: Tensor | None) -> None:
        """An operand whose memory is taken as it is."""
        self.buffers.append((t, 0))

    def image(self, t: Tensor | None) -> None:
        """An NHWC operand, perhaps a channel slice."""
        ld = 0 if t is None else pixel_stride(t)
        assert ld is not None
        self.buffers.append((t, ld))

    def affine(self, scale: Tensor | None, shift: Tensor | None, act: int) -> None:
        """The prologue or epilogue of one operand."""
        self.flat(scale, shift)
        self.numbers.append(act)

    def filter(self, weight: Tensor) -> None:
        """A depthwise weight."""
        self.flat(weight)
        self.numbers.append(int(weight.dtype == torch.float32))

    def run(self) -> None:
        """Runs the driver and writes its results into the buffers' memory."""
        out = bytearray(struct.pack(f"<{len(self.numbers) + 2}q", len(self.numbers), *self.numbers, len(self.buffers)))
        sizes = []
        for t, ld in self.buffers:
            data = b"" if t is None else _storage(t)
            offset = 0 if t is None else t.storage_offset() * t.element_size()
            out += struct.pack("<3q", -1 if t is None else len(data), offset, ld) + data
            sizes.append(len(data))
        data, _ = _drive(bytes(out))
        at = 0
        for (t, _), size in zip(self.buffers, sizes, strict=True):
            if size:
                whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
                whole.copy_(torch.frombuffer(bytearray(data[at : at + size]), dtype=t.dtype))
            at += size


def _geometry(x: Tensor, weight: Tensor, stride, padding, dilation) -> tuple[list[int], int, int]:
    n, k, h, w = x.shape
    c, _, r, s = weight.shape
    p, q = conv_out_sizes((h, w), (r, s), stride, padding, dilation)
    return [n, h, w, k, p, q, c, r, s, *stride, *padding, *dilation], p, q


def _statistics(channels: int, stats: bool) -> list[Tensor | None]:
    return [torch.full((channels,), float("nan")) if stats else None for _ in range(2)]


def depthwise_fwd(
    x, weight, in_scale, in_shift, in_act, out_scale, out_shift, out_act, residual, stride, padding, dilation, stats
):
    """As fastcnn.ops' reference, mean and var None without stats."""
    geometry, p, q = _geometry(x, weight, stride, padding, dilation)
    y, moments = empty_nhwc(x.shape[0], weight.shape[0], p, q, x.dtype), _statistics(weight.shape[0], stats)
    case = Case(0, x, geometry)
    case.image(x)
    case.filter(weight)
    case.affine(in_scale, in_shift, in_act)
    case.affine(out_scale, out_shift, out_act)
    case.image(residual)
    case.image(y)
    case.flat(*moments)
    case.run()
    return y, *moments


def depthwise_bwd(
    grad, y, y_scale, y_shift, y_act, coef, x, x_scale, x_shift, x_act, x_mean, weight, stride, padding, dilation,
    need_dx, need_dw, need_sums,
):  # fmt: skip
    """As fastcnn.ops' reference, None for what is not needed."""
    geometry, _, _ = _geometry(x, weight, stride, padding, dilation)
    dx = empty_nhwc(*x.shape, x.dtype) if need_dx else None
    dw = torch.full(weight.shape, float("nan")) if need_dw else None
    sums = torch.full((2, x.shape[1]), float("nan")) if need_sums else None
    case = Case(1, x, geometry)
    case.image(grad)
    case.image(y)
    case.affine(y_scale, y_shift, y_act)
    case.flat(coef)
    case.image(x)
    case.affine(x_scale, x_shift, x_act)
    case.flat(x_mean)
    case.filter(weight)
    case.image(dx)
    case.flat(dw, sums)
    case.run()
    return dx, dw, sums


def separable_fwd(
    x, dw_weight, pw_weight, in_scale, in_shift, in_act, mid_scale, mid_shift, mid_act, out_scale, out_shift, out_act,
    residual, stride, padding, dilation, stats, m=0,
):  # fmt: skip
    """As fastcnn.ops' reference, mean and var None without stats; `m` pixels per product unless 0."""
    geometry, p, q = _geometry(x, dw_weight, stride, padding, dilation)
    channels = pw_weight.shape[0]
    y, moments = empty_nhwc(x.shape[0], channels, p, q, x.dtype), _statistics(channels, stats)
    case = Case(2, x, geometry)
    case.numbers += [channels, m]
    case.image(x)
    case.filter(dw_weight)
    case.flat(pw_weight)
    case.affine(in_scale, in_shift, in_act)
    case.affine(mid_scale, mid_shift, mid_act)
    case.affine(out_scale, out_shift, out_act)
    case.image(residual)
    case.image(y)
    case.flat(*moments)
    case.run()
    return y, *moments


def _dropout(
    op: int, x: Tensor, bias: Tensor | None, act: int, p: float, scale: float, unit: int, seed: Tensor
) -> Case:
    case = Case(op, x, [*mask_of(x, bias, unit), threshold(p), act])
    case.flat(torch.tensor([scale]), seed, bias)
    return case


def dropout_fwd(x, bias, act, residual, p, scale, unit, seed):
    """As fastcnn.ops' reference."""
    out = torch.full_like(x, float("nan"))
    case = _dropout(3, x, bias, act, p, scale, unit, seed)
    for t in (x, residual, out):
        case.dense(t)
    case.run()
    return out


def dropout_inplace(x, p, scale, unit, seed):
    """As fastcnn.ops' reference."""
    case = _dropout(3, x, None, 0, p, scale, unit, seed)
    for t in (x, None, None):
        case.dense(t)
    case.run()


def dropout_bwd(grad, z, bias, act, p, scale, unit, seed, need_bias):
    """As fastcnn.ops' reference, an empty dbias where it is not needed."""
    dx, dbias = torch.full_like(grad, float("nan")), torch.full(bias.shape if need_bias else (0,), float("nan"))
    case = _dropout(4, grad, bias, act, p, scale, unit, seed)
    for t in (grad, z, dx, dbias if need_bias else None):
        case.dense(t)
    case.run()
    return dx, dbias


def _capsules(op: int, u: Tensor, weight: Tensor, iterations: int, leaky: bool) -> Case:
    return Case(op, u, [*u.shape, weight.shape[1], weight.shape[3], iterations, int(leaky)])


def capsule_routing_fwd(u, weight, bias, iterations, leaky):
    """As fastcnn.ops' reference."""
    shape = (u.shape[0], *weight.shape[1::2])
    v = torch.full(shape, float("nan"), dtype=u.dtype)
    s = torch.full((iterations, *shape), float("nan"))
    case = _capsules(5, u, weight, iterations, leaky)
    case.flat(u, weight, bias, v, s)
    case.run()
    return v, s


def capsule_routing_bwd(grad, u, weight, s, leaky, detach, need_du, need_dw):
    """As fastcnn.ops' reference, empty where it is not needed."""
    du = torch.full(u.shape if need_du else (0,), float("nan"), dtype=u.dtype)
    dw = torch.full(weight.shape if need_dw else (0,), float("nan"))
    dbias = torch.full(weight.shape[1::2], float("nan"))
    case = _capsules(6, u, weight, s.shape[0], leaky)
    case.numbers.append(int(detach))
    case.flat(grad, u, weight, s, du if need_du else None, dw if need_dw else None, dbias)
    case.run()
    return du, dw, dbias
