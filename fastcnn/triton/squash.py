"""squash of whole rows in registers, and its gradient; the capsule kernels use the same functions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.triton.launch import cdiv, pow2, primitive

# Elements of a tile: 16 for each of 128 threads.
TILE = 2048


@triton.jit
def row_norms(s):
    """|s| of rows [ROWS, DIM] with squares that neither overflow nor vanish, and 1 where it is 0."""
    largest = tl.max(tl.abs(s), 1)
    unit = tl.where(largest > 0, largest, 1.0)
    scaled = s / unit[:, None]
    square = tl.sum(scaled * scaled, 1)
    return tl.where(square > 0, tl.sqrt(square), 1.0) * unit


@triton.jit
def squash_rows(s):
    """squash of float32 rows [ROWS, DIM]: n / (1 + n^2) is the same for n and 1 / n."""
    norm = row_norms(s)
    m = tl.minimum(norm, 1 / norm)
    return s * (m / (1 + m * m))[:, None]


@triton.jit
def squash_gradient_rows(g, s):
    """The gradient of squash_rows, as fastcnn.ops.squash.squash_gradient writes it: 0 where s is 0."""
    norm = row_norms(s)
    m = tl.minimum(norm, 1 / norm)
    f = m / (1 + m * m)
    slope = f * (1 - m * m) / (1 + m * m) * tl.where(norm > 1, -1.0, 1.0)
    direction = s / norm[:, None]
    along = slope * tl.sum(direction * g, 1)
    f = tl.where(tl.max(tl.abs(s), 1) > 0, f, 0.0)
    return f[:, None] * g + along[:, None] * direction


@triton.jit
def row_tile(rows, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The offsets of a program's rows [ROWS, BLOCK] of a contiguous [rows, DIM], and which elements there are."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    return row.to(tl.int64)[:, None] * DIM + column[None, :], (row < rows)[:, None] & (column < DIM)[None, :]


@triton.jit(do_not_specialize=["rows"])
def squash_kernel(s, grad, out, rows, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """squash of s [rows, DIM] or, with grad, its gradient."""
    offsets, mask = row_tile(rows, DIM, ROWS, BLOCK)
    value = tl.load(s + offsets, mask=mask, other=0.0).to(tl.float32)
    if grad is None:
        result = squash_rows(value)
    else:
        result = squash_gradient_rows(tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32), value)
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)


def row_blocks(dim: int, tile: int = TILE) -> tuple[int, int, int]:
    """Rows and columns of a tile of rows of dim, and its warps: at most 64 elements a thread (MAX_VECTOR)."""
    block = pow2(dim, 1, 1 << 30)
    return max(1, tile // block), block, min(max(block // 1024, 4), 16)


def _run(s: Tensor, grad: Tensor | None) -> Tensor:
    s, dim = s.contiguous(), s.shape[-1]
    out = torch.empty_like(s)
    if s.numel():
        rows = s.numel() // dim
        block_rows, block, warps = row_blocks(dim)
        squash_kernel[(cdiv(rows, block_rows),)](s, grad, out, rows, dim, block_rows, block, num_warps=warps)
    return out


@primitive
def squash_fwd(s: Tensor) -> Tensor:
    """squash of rows [..., D], in s's dtype."""
    return _run(s, None)


@primitive
def squash_bwd(grad: Tensor, s: Tensor) -> Tensor:
    """The gradient of squash_fwd, in s's dtype."""
    return _run(s, grad.contiguous())
