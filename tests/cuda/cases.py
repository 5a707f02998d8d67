"""Random arguments for the primitives, their float64 reference results, and the comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastcnn.ops.depthwise_conv2d import depthwise_bwd, depthwise_fwd
from fastcnn.ops.layout import conv_out_sizes
from fastcnn.ops.separable_conv2d import separable_fwd

REFERENCES = {"depthwise_fwd": depthwise_fwd, "depthwise_bwd": depthwise_bwd, "separable_fwd": separable_fwd}
# ||out - reference|| / ||reference||: half a unit in the last place of a store is 2e-3 and 2.5e-4 of a value.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}
NONE, RELU, RELU6, SILU, HARDSWISH = range(5)


@dataclass(frozen=True)
class Shape:
    """One convolution. Everything optional is on unless `plain`."""

    n: int = 2
    k: int = 33
    h: int = 9
    w: int = 14
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    channels: int = 24  # of the pointwise product
    in_act: int = RELU6
    mid_act: int = RELU
    out_act: int = HARDSWISH
    plain: bool = False
    slices: bool = False  # images are channel slices of wider buffers
    stats: bool = False
    mean: float = 0.0  # of the output, over a standard deviation of about 1
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        pair = lambda v: f"{v[0]}x{v[1]}"  # noqa: E731
        flags = "".join(f"-{f}" for f in ("plain", "slices", "stats") if getattr(self, f))
        return (
            f"{str(self.dtype)[6:]}-n{self.n}k{self.k}m{self.multiplier}c{self.channels}-{self.h}x{self.w}"
            f"-f{pair(self.kernel)}s{pair(self.stride)}p{pair(self.padding)}d{pair(self.dilation)}"
            f"-a{self.in_act}{self.mid_act}{self.out_act}{flags}" + (f"-mean{self.mean:g}" if self.mean else "")
        )


class Draw:
    """Random tensors of a shape's dtype, on a device."""

    def __init__(self, shape: Shape, device: str):
        self.shape, self.device = shape, device
        self.generator = torch.Generator().manual_seed(shape.seed)

    def normal(self, *size: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        """float32 values."""
        return (torch.randn(*size, generator=self.generator) * scale + offset).to(self.device)

    def image(self, n: int, c: int, h: int, w: int) -> Tensor:
        """An NHWC tensor in the op's dtype, or a slice of a wider one."""
        spare = 8 if self.shape.slices else 0
        wide = self.normal(n, h, w, c + 2 * spare).to(self.shape.dtype).permute(0, 3, 1, 2)
        return wide[:, spare : spare + c]

    def affine(self, c: int) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift, both absent when plain."""
        if self.shape.plain:
            return None, None
        return self.normal(c, scale=0.3, offset=1), self.normal(c, scale=0.5)


def output_size(s: Shape) -> tuple[int, int]:
    """Pixels of the convolution's output."""
    return tuple(conv_out_sizes((s.h, s.w), s.kernel, s.stride, s.padding, s.dilation))


def _act(s: Shape, act: int) -> int:
    return NONE if s.plain else act


def _weight(s: Shape, draw: Draw) -> Tensor:
    c, (r, t) = s.k * s.multiplier, s.kernel
    return draw.normal(c, 1, r, t, scale=(r * t) ** -0.5).to(s.dtype)


def _out(s: Shape, draw: Draw, c: int, p: int, q: int):
    """out_scale, out_shift, out_act, residual: with statistics there is no activation and no residual."""
    if s.mean:
        return None, draw.normal(c, offset=s.mean), NONE, None
    if s.stats:
        return None, None, NONE, None
    residual = None if s.plain else draw.image(s.n, c, p, q)
    return (*draw.affine(c), _act(s, s.out_act), residual)


def arguments(primitive: str, s: Shape, device: str = "cpu") -> tuple:
    """The primitive's arguments."""
    draw, (p, q), c = Draw(s, device), output_size(s), s.k * s.multiplier
    x, weight = draw.image(s.n, s.k, s.h, s.w), _weight(s, draw)
    in_affine = (*draw.affine(s.k), _act(s, s.in_act))
    geometry = (s.stride, s.padding, s.dilation)
    if primitive == "depthwise_fwd":
        return (x, weight, *in_affine, *_out(s, draw, c, p, q), *geometry, s.stats)
    if primitive == "separable_fwd":
        pointwise = draw.normal(s.channels, c, 1, 1, scale=c**-0.5).to(s.dtype)
        mid = (*draw.affine(c), _act(s, s.mid_act))
        return (x, weight, pointwise, *in_affine, *mid, *_out(s, draw, s.channels, p, q), *geometry, s.stats)
    grad = draw.image(s.n, c, p, q)
    upstream = (grad, None, None, None, NONE, None)
    if not s.plain:
        coef = torch.stack([draw.normal(c, offset=1, scale=0.2) for _ in range(4)])
        upstream = (grad, draw.image(s.n, c, p, q), *draw.affine(c), s.out_act, coef)
    mean = None if s.plain else draw.normal(s.k)
    return (*upstream, x, *in_affine, mean, weight, *geometry, True, True, True)


def reference(primitive: str, args: tuple) -> tuple:
    """The float64 results."""
    wide = [a.double() if isinstance(a, Tensor) else a for a in args]
    return REFERENCES[primitive](*wide)


def error(out: Tensor, ref: Tensor) -> float:
    """Relative error in the 2-norm; NaN counts as infinite."""
    assert out.shape == ref.shape, (out.shape, ref.shape)
    ref = ref.double().cpu()
    value = float((out.double().cpu() - ref).norm() / ref.norm().clamp_min(1e-30))
    return value if value == value else float("inf")


def check(primitive: str, shape: Shape, outputs: tuple, references: tuple) -> None:
    """Every output within its tolerance."""
    tolerance = TOLERANCES[shape.dtype]
    for i, (out, ref) in enumerate(zip(outputs, references, strict=True)):
        if out is None or (out.numel() == 0 and ref.numel() == 0):
            continue
        assert error(out, ref) <= tolerance, f"{primitive} output {i}: error {error(out, ref):.3g} > {tolerance}"


def variants(base: Shape, *changes: dict) -> list[Shape]:
    """The base with each set of changes."""
    return [replace(base, **change, seed=i) for i, change in enumerate(changes)]
