"""Dropout's cases: random arguments, their float64 reference results, and the comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastcnn.ops.dropout import CHANNEL, ELEMENT, SAMPLE, dropout_bwd, dropout_fwd, kept, mask_of
from tests.cuda.cases import HARDSWISH, NONE, RELU, RELU6, SILU, TOLERANCES, error

REFERENCES = {"dropout_fwd": dropout_fwd, "dropout_bwd": dropout_bwd}
UNITS = {"element": ELEMENT, "channel": CHANNEL, "sample": SAMPLE}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call, forward or backward."""

    shape: tuple[int, ...]
    unit: int = ELEMENT
    p: float = 0.3
    act: int = NONE
    bias: bool = False
    residual: bool = False
    nhwc: bool = True
    past: int = 0  # elements that memory begins past a 16-byte boundary
    dtype: torch.dtype = F32
    seed: int = 0

    def __str__(self) -> str:
        flags = "".join(f"-{f}" for f in ("bias", "residual") if getattr(self, f))
        layout = ("-nhwc" if self.nhwc else "-nchw") if len(self.shape) == 4 else ""
        past = f"-past{self.past}" if self.past else ""
        size, unit = "x".join(map(str, self.shape)), list(UNITS)[self.unit]
        return f"{str(self.dtype)[6:]}-{size}{layout}-{unit}-p{self.p:g}-a{self.act}{flags}{past}"


def placed(values: Tensor, case: Case) -> Tensor:
    """Values [numel] as a tensor of the case's shape, dtype, layout and alignment."""
    nhwc = len(case.shape) == 4 and case.nhwc
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    strides = torch.empty(case.shape, device="meta", memory_format=memory_format).stride()
    memory = torch.cat([values.new_zeros(case.past), values]).to(case.dtype)
    return memory.as_strided(case.shape, strides, case.past)


def seed_of(key: int = -0x123456789ABCDEF, offset: int = 0x7EDCBA9876543210, device: str = "cpu") -> Tensor:
    """A key and an offset with both halves in use."""
    return torch.tensor([key, offset], device=device)


def arguments(primitive: str, case: Case, device: str = "cpu") -> tuple:
    """The primitive's arguments."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    size = torch.Size(case.shape).numel()
    x, other = (placed(normal(size), case) for _ in range(2))
    bias = normal(case.shape[1] if len(case.shape) == 4 else case.shape[-1]) if case.bias else None
    how = (case.p, 1 / (1 - case.p) if case.p < 1 else 1.0, case.unit, seed_of(device=device))
    if primitive == "dropout_fwd":
        return x, bias, case.act, other if case.residual else None, *how
    return other, x if case.act else None, bias, case.act, *how, case.bias


def reference(primitive: str, args: tuple) -> tuple[Tensor, ...]:
    """The float64 results."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    results = REFERENCES[primitive](*wide)
    return results if isinstance(results, tuple) else (results,)


def check(primitive: str, case: Case, outputs: tuple | Tensor, references: tuple) -> None:
    """Every output within its tolerance."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # The bias's gradient sums what dx is rounded from, in any dtype.
    for name, out, ref, dtype in zip(("first", "dbias"), outputs, references, (case.dtype, F32), strict=False):
        if ref.numel() == 0:
            assert out.numel() == 0
            continue
        assert error(out, ref) <= TOLERANCES[dtype], f"{primitive} {name} output: error {error(out, ref):.3g}"


def kept_like(x: Tensor, bias: Tensor | None, p: float, unit: int, seed: Tensor) -> Tensor:
    """Which elements of x stay, in x's shape and layout."""
    mask = mask_of(x, bias, unit)
    stay = kept(mask, p, seed).expand(mask.rows, mask.channels).contiguous()
    return stay.as_strided(x.shape, x.stride(), 0)


# Around vectors of 4 and 8, lines of several rows, rows of several samples in one vector, few and many lines.
SHAPES = [
    (1,),
    (7,),
    (9,),
    (2051,),
    (3, 5),
    (64, 33),
    (300, 3),
    (70, 1),
    (3, 2500),
    (2, 3, 1, 1),
    (3, 33, 4, 5),
    (5, 6, 1, 3),
    (2, 64, 7, 7),
    (9, 8, 3, 3),
]


def _variants(*changes: dict) -> list[Case]:
    base = Case((3, 33, 4, 5), bias=True, residual=True)
    return [replace(base, **change, seed=i) for i, change in enumerate(changes)]


CASES = _variants(
    {"act": RELU},
    {"act": RELU6, "dtype": BF16},
    {"act": SILU, "dtype": F16, "unit": CHANNEL},
    {"act": HARDSWISH, "unit": SAMPLE},
    {"shape": (2, 64, 7, 7), "act": HARDSWISH, "dtype": BF16, "unit": CHANNEL},
    {"shape": (2, 64, 7, 7), "act": SILU, "dtype": BF16, "unit": SAMPLE},
    {"shape": (2, 64, 7, 7), "act": RELU, "dtype": F16, "past": 1},
    {"shape": (2, 64, 7, 7), "act": RELU6, "unit": CHANNEL, "past": 3},
    {"shape": (9, 130), "act": SILU},
    {"shape": (9, 130), "act": RELU, "dtype": BF16, "unit": CHANNEL},
    {"shape": (6000, 3), "dtype": BF16, "act": RELU},
    {"shape": (700, 1), "dtype": F16, "unit": SAMPLE},
    {"shape": (2, 16, 40, 41), "dtype": BF16, "act": HARDSWISH},
    {"shape": (2, 16, 40, 41), "unit": CHANNEL, "act": SILU},
    {"shape": (1, 2600), "residual": False},
    {"shape": (2, 24, 5, 5), "p": 0.0, "act": SILU, "dtype": BF16},
    {"shape": (2, 24, 5, 5), "p": 1.0, "act": SILU, "dtype": BF16},
    {"shape": (2, 24, 5, 5), "bias": False, "act": RELU, "dtype": F16},
    {"shape": (2, 9, 5, 5), "bias": False, "nhwc": False, "act": HARDSWISH, "dtype": BF16},
    {"shape": (2, 9, 5, 5), "bias": False, "nhwc": False, "unit": CHANNEL},
    {"shape": (2, 9, 5, 5), "bias": False, "unit": CHANNEL, "dtype": BF16},
    {"shape": (4, 9, 5, 5), "bias": False, "nhwc": False, "unit": SAMPLE, "dtype": F16},
    {"shape": (5000,), "bias": False, "past": 5, "dtype": BF16},
    {"shape": (9001,), "bias": False, "residual": False, "dtype": BF16},
)
