"""Capsule routing's cases: random arguments, their float64 reference results, and the comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastcnn.ops.capsule_routing import capsule_routing_bwd, capsule_routing_fwd
from tests.tolerances import assert_close

REFERENCES = {"capsule_routing_fwd": capsule_routing_fwd, "capsule_routing_bwd": capsule_routing_bwd}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call, forward or backward."""

    sizes: tuple[int, int, int, int, int]  # batch, in_caps, in_dim, out_caps, out_dim
    iterations: int = 3
    bias: bool = True
    leaky: bool = False
    detach: bool = False
    needs: tuple[bool, bool] = (True, True)
    scale: float = 1.0  # of the weights: the larger, the further from uniform the coupling
    dtype: torch.dtype = F32
    seed: int = 0

    def __str__(self) -> str:
        flags = "".join(f"-{f}" for f in ("bias", "leaky", "detach") if getattr(self, f))
        needs = "" if all(self.needs) else f"-du{self.needs[0]:d}dw{self.needs[1]:d}"
        size, scale = "x".join(map(str, self.sizes)), f"-scale{self.scale:g}" if self.scale != 1 else ""
        return f"{str(self.dtype)[6:]}-{size}-t{self.iterations}{flags}{needs}{scale}"


def arguments(primitive: str, case: Case, device: str = "cpu") -> tuple:
    """The primitive's arguments."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    batch, in_caps, in_dim, out_caps, out_dim = case.sizes
    u = normal(batch, in_caps, in_dim).to(case.dtype)
    weight = normal(in_caps, out_caps, in_dim, out_dim) * case.scale / (in_dim * in_caps**0.5) ** 0.5
    bias = normal(out_caps, out_dim) / 4 if case.bias else None
    forward = (u, weight, bias, case.iterations, case.leaky)
    if primitive == "capsule_routing_bwd":
        _, s = reference("capsule_routing_fwd", forward)
        grad = normal(batch, out_caps, out_dim).to(case.dtype)
        forward = (grad, u, weight, s.float(), case.leaky, case.detach, *case.needs)
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in forward)


def reference(primitive: str, args: tuple) -> tuple[Tensor, ...]:
    """The float64 results."""
    return REFERENCES[primitive](*(a.double() if isinstance(a, Tensor) else a for a in args))


def check(primitive: str, case: Case, outputs: tuple[Tensor, ...], references: tuple[Tensor, ...]) -> None:
    """Every output within its tolerance."""
    # v and du are rounded to u's dtype; the rest is float32 for any dtype.
    for i, (out, ref) in enumerate(zip(outputs, references, strict=True)):
        assert_close(out.cpu(), ref.cpu(), case.dtype if i == 0 else F32, f"{primitive} output {i}")


def _variants(*changes: dict) -> list[Case]:
    base = Case((17, 33, 4, 3, 8))
    return [replace(base, **change, seed=i) for i, change in enumerate(changes)]


# Around quads, warps, groups of four and eight images, stages of eight coordinates, and columns for eight images.
CASES = _variants(
    {"sizes": (1, 1, 1, 1, 1)},
    {"sizes": (2, 5, 3, 4, 7), "leaky": True},
    {"sizes": (16, 9, 8, 10, 16), "scale": 4.0},
    {"iterations": 1, "dtype": BF16},
    {"iterations": 2, "leaky": True, "bias": False},
    {"iterations": 5, "scale": 3.0},
    {"detach": True},
    {"detach": True, "iterations": 1},
    {"detach": True, "iterations": 2, "leaky": True, "dtype": F16},
    {"needs": (True, False)},
    {"needs": (False, True), "dtype": BF16},
    {"needs": (False, False)},
    {"sizes": (33, 7, 9, 17, 5), "dtype": F16},
    {"sizes": (5, 130, 8, 2, 33), "leaky": True},
    {"sizes": (4, 21, 16, 10, 16), "dtype": BF16},
    {"sizes": (25, 70, 8, 10, 16), "scale": 3.0, "dtype": BF16},
    {"sizes": (9, 3, 2, 33, 16), "iterations": 2},
    {"sizes": (3, 4, 11, 64, 16), "iterations": 2, "leaky": True},
    {"sizes": (6, 3, 5, 100, 18), "iterations": 2},
)
