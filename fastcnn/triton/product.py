"""What every matrix product of a convolution shares: its tiles, and what becomes of them after the product."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.ops.activations import RELU6
from fastcnn.triton.activations import mask_gradient
from fastcnn.triton.launch import cdiv, pow2
from fastcnn.triton.prologue_epilogue import epilogue, load_affine, per_channel
from fastcnn.triton.reductions import tile_moments


@triton.jit
def store_output(
    acc, y, y_ld, first, rows, valid, columns, column_mask, C, out_scale, out_shift, OUT_ACT: tl.constexpr,
    residual, residual_ld, moments, tile, tiles, FIRST,
):  # fmt: skip
    """Stores the epilogue of pixels first + rows and channels ``columns`` of C, and the tile's share of the moments."""
    mask = valid[:, None] & column_mask[None, :]
    if residual is not None:
        residual += first.to(tl.int64) * residual_ld
    residual_offsets = rows[:, None] * residual_ld + columns[None, :]
    if out_scale is not None:
        out_scale = per_channel(out_scale, columns, column_mask)
    if out_shift is not None:
        out_shift = per_channel(out_shift, columns, column_mask)
    acc = epilogue(acc, out_scale, out_shift, OUT_ACT, residual, residual_offsets, mask)
    y += first.to(tl.int64) * y_ld
    offsets = rows[:, None] * y_ld + columns[None, :]
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=mask)
    if moments is not None:
        tile_moments(y, offsets, mask, valid, moments, tile, tiles, columns, column_mask, C, FIRST)


@triton.jit
def store_input_gradient(
    acc, x, x_offsets, dx, dx_offsets, mask, columns, column_mask, K,
    x_scale, x_shift, X_ACT: tl.constexpr, x_mean, sums, tile, residual, ADDS: tl.constexpr,
):  # fmt: skip
    """Stores acc * x_act'(x) at dx, and the tile's share of the sums (rows [tiles, 2, K]); or, without sums, plus residual.

    The residual lies like dx. With ADDS the result, times x_scale after its sums, is added to what dx holds.
    """
    if ADDS:
        before = tl.load(dx + dx_offsets, mask=mask, other=0.0)
    if X_ACT != 0:
        raw = tl.load(x + x_offsets, mask=mask, other=0.0)
        acc = mask_gradient(acc, load_affine(raw, x_scale, x_shift, columns, column_mask), X_ACT)
    if residual is not None:
        acc += tl.load(residual + dx_offsets, mask=mask, other=0.0).to(tl.float32)
    if ADDS and sums is not None:
        # dx lends its memory to the read-back: no thread may still have to read what it held.
        tl.debug_barrier()
    if not ADDS or sums is not None:
        tl.store(dx + dx_offsets, acc.to(dx.dtype.element_ty), mask=mask)
    if sums is not None:
        # Read back as in tile_moments; and the product, x and their sums at a time do not fit registers beside a SiLU.
        tl.debug_barrier()
        out = tl.load(dx + dx_offsets, mask=mask, other=0.0).to(tl.float32)
        raw = tl.load(x + x_offsets, mask=mask, other=0.0).to(tl.float32)
        if x_mean is not None:
            raw -= per_channel(x_mean, columns, column_mask)
        row = sums + tile.to(tl.int64) * 2 * K + columns
        tl.store(row, tl.sum(out, 0), mask=column_mask)
        tl.store(row + K, tl.sum(out * raw, 0), mask=column_mask)
        if ADDS:
            acc = out
            tl.debug_barrier()
    if ADDS:
        if x_scale is not None:
            acc *= per_channel(x_scale, columns, column_mask)
        tl.store(dx + dx_offsets, (before.to(tl.float32) + acc).to(dx.dtype.element_ty), mask=mask)


class Tiles(NamedTuple):
    """The shape of a product's tile and what Triton needs to pipeline it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def _tiles(m: int, n: int, k: int, itemsize: int, products: int, columns: int, step: int, wide: bool) -> Tiles:
    block_n = pow2(n, 16, columns)
    block_m = 128 if cdiv(m, 128) * cdiv(n, block_n) * products >= 132 else 64
    warps = 8 if block_m * block_n >= (16384 if itemsize < 4 else 4096) or (wide and block_m == 128) else 4
    return Tiles(block_m, block_n, pow2(k, 16, step), warps, 3)


def product_tiles(m: int, n: int, k: int, itemsize: int, vec: int, products: int = 1, gathered: bool = False) -> Tiles:
    """The tile of [m, k] x [k, n] products; it depends on shapes alone, so that statistics do not depend on the GPU.

    128 x 128 with 8 warps leaves registers for the prologue (64 accumulators a thread). Products that fill fewer than
    132 such tiles (the SMs of an H100) are cut to 64 rows, the least that wgmma takes. Float32 has 64 columns: three
    TF32 products hold both halves of both operands in registers. Three stages of 128 bytes of k take up to 100 KB of
    shared memory (150 KB with the two operands of a gradient).

    The left operand is loaded in vectors of vec. Single elements have an address each in registers: 64 bytes of k then.
    A gathered operand has a mask for each vector: 128 rows take 8 warps however few the columns.
    """
    step = (128 if vec > 1 else 64) // itemsize
    return _tiles(m, n, k, itemsize, products, 128 if itemsize < 4 else 64, step, gathered)


def input_gradient_tiles(
    m: int, n: int, k: int, itemsize: int, vec: int, x_act: int, products: int = 1, gathered: bool = False
) -> Tiles:
    """product_tiles for an input gradient: its left operand is made of two tensors, and its result meets a third.

    So 128 rows always take 8 warps (4 would hold 64 elements of both tensors a thread), a gathered operand 64 bytes of
    k, single elements 32, and 64 columns are what fits beside the derivative of a SiLU or hardswish.
    """
    step = (32 if vec == 1 else 64 if gathered else 128) // itemsize
    columns = 128 if itemsize < 4 and x_act <= RELU6 else 64
    return _tiles(m, n, k, itemsize, products, columns, step, True)


def weight_gradient_tiles(c: int, k: int, itemsize: int, vec: int, gathered: bool = False) -> Tiles:
    """The tile [n, k] of a weight gradient [c, k], summed over m pixels a step; vec is the narrower operand's.

    Float32 tiles have 64 rows: three TF32 products of transposed operands take twice the registers. Single elements
    take 32 pixels a step, and they and a gathered operand 8 warps, for the reasons of product_tiles. Float32 in 4 warps
    takes 16 pixels a step: with 32, what is split for mma.sync needs a few registers more than there are.
    """
    block_c = pow2(c, 16, 64 if itemsize == 4 else 128)
    warps = 8 if block_c == 128 or vec == 1 or gathered else 4
    step = (16 if warps == 4 else 32) if itemsize == 4 else 32 if vec == 1 else 64
    return Tiles(step, block_c, pow2(k, 16, 64), warps, 3)


def pixel_splits(m: int, tiles: int, step: int) -> tuple[int, int]:
    """Programs among which a weight gradient's m pixels are split, and the pixels (a multiple of step) of each.

    Two waves of 132 programs, at least 1,024 pixels each.
    """
    splits = max(1, min(cdiv(264, tiles), m // 1024))
    return splits, cdiv(cdiv(m, splits), step) * step


def matrix(weight: Tensor, x: Tensor) -> Tensor:
    """A 1x1 weight as a dense [C, K] matrix in x's dtype."""
    return weight.reshape(weight.shape[0], -1).to(x.dtype).contiguous()


def sums_buffer(rows: int, channels: int, like: Tensor) -> Tensor:
    """Where store_input_gradient leaves its rows."""
    return torch.empty((rows, 2, channels), dtype=torch.float32, device=like.device)
