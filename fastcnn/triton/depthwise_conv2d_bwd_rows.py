"""Gradients of the depthwise convolution where they have a kernel each, one row of taps at a time.

For kernels above 5 x 5, whose taps of dw do not fit registers, and for a depth multiplier, whose gradients do not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.triton.activations import activate
from fastcnn.triton.depthwise_conv2d import depthwise_tile
from fastcnn.triton.launch import cdiv
from fastcnn.triton.prologue_epilogue import affine, load_coefficients, load_gradient, per_channel
from fastcnn.triton.reductions import sum_rows
from fastcnn.triton.stencil import add_at, adjoint_tap, first_gradient, gradients, group_origin, store_dx, tap_at, zeros

INTEGERS = ["images", "c_vectors", "grad_vectors", "y_vectors", "x_vectors", "H", "W", "P", "Q", "tiles_per_program"]


@triton.jit
def gather_row(
    acc, grad, grad_ld, y, y_ld, y_scale, y_shift, coef, taps, p, row_mask, w0, channels, channel_mask, C, Q,
    Y_ACT: tl.constexpr, S: tl.constexpr, SW: tl.constexpr, PW: tl.constexpr, DW: tl.constexpr, QT: tl.constexpr,
):  # fmt: skip
    """acc[j] += sum over s of dy[p, q] * taps[s] with q SW = w0 + j + PW - s DW: one row of taps of dx."""
    if y_scale is not None:
        y_scale = per_channel(y_scale, channels, channel_mask)
    if y_shift is not None:
        y_shift = per_channel(y_shift, channels, channel_mask)
    if coef is not None:
        coef = load_coefficients(coef, channels, channel_mask, C)
    for dv in tl.static_range(gradients(PW, SW, DW, S, QT)):
        q = w0 // SW + dv + first_gradient(PW, SW, DW, S)
        mask = (row_mask & (q >= 0) & (q < Q))[:, None] & channel_mask[None, :]
        pixel = p * Q + q
        dy = load_gradient(
            grad, (pixel * grad_ld)[:, None] + channels[None, :], y, (pixel * y_ld)[:, None] + channels[None, :],
            y_scale, y_shift, Y_ACT, coef, mask,
        )  # fmt: skip
        for j in tl.static_range(QT):
            if adjoint_tap(0, j, 0, dv, 1, S, 1, SW, 0, PW, 1, DW) >= 0:
                tap = per_channel(
                    taps + adjoint_tap(0, j, 0, dv, 1, S, 1, SW, 0, PW, 1, DW) * C, channels, channel_mask
                )
                acc = acc[:j] + (acc[j] + dy * tap,) + acc[j + 1 :]
    return acc


@triton.jit(do_not_specialize=INTEGERS)
def depthwise_dgrad_kernel(
    grad, y, y_scale, y_shift, coef, x, x_scale, x_shift, x_mean, taps, dx, partials,
    images, k_vectors, grad_vectors, y_vectors, x_vectors, H, W, P, Q,
    Y_ACT: tl.constexpr, X_ACT: tl.constexpr, R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, VEC: tl.constexpr,
    MULTIPLIER: tl.constexpr, QT: tl.constexpr, TILE_P: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """dx as in depthwise_bwd_kernel, one row of taps at a time, and the tile's share of sums (rows [tiles, 2, K])."""
    K = k_vectors * VEC
    C = K * MULTIPLIER
    grad_ld = grad_vectors * VEC
    y_ld = y_vectors * VEC
    x_ld = x_vectors * VEC
    tiles_c = tl.cdiv(K, BLOCK_C)
    tiles_q = tl.cdiv(W, QT * TILE_Q)
    tiles = tl.cdiv(H, TILE_P) * tiles_q
    tile = tl.program_id(0) // tiles_c
    image = (tile // tiles).to(tl.int64)
    h0, w0 = group_origin(tile % tiles, tiles_q, 1, QT, TILE_P, TILE_Q)
    channels = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < K
    grad += image * P * Q * grad_ld
    if y is not None:
        y += image * P * Q * y_ld

    if x_scale is not None:
        x_scale = per_channel(x_scale, channels, channel_mask)
    if x_shift is not None:
        x_shift = per_channel(x_shift, channels, channel_mask)
    if x_mean is not None:
        x_mean = per_channel(x_mean, channels, channel_mask)
    acc = zeros(QT, TILE_P * TILE_Q, BLOCK_C)
    for r in range(R):
        # Rows that the stride skips are masked off: large kernels with a stride are rare.
        reach = h0 + PH - r * DH
        p = reach // SH
        row_mask = (reach >= 0) & (reach % SH == 0) & (p < P)
        for m in tl.static_range(MULTIPLIER):
            acc = gather_row(
                acc, grad, grad_ld, y, y_ld, y_scale, y_shift, coef, taps + r * S * C, p, row_mask, w0,
                channels * MULTIPLIER + m, channel_mask, C, Q, Y_ACT, S, SW, PW, DW, QT,
            )  # fmt: skip

    total = tl.zeros([TILE_P * TILE_Q, BLOCK_C], tl.float32)
    moment = tl.zeros([TILE_P * TILE_Q, BLOCK_C], tl.float32)
    for j in tl.static_range(QT):
        total, moment = store_dx(
            acc[j], x + image * H * W * x_ld, dx + image * H * W * K, x_ld, K, h0 * W + w0 + j,
            (h0 < H) & (w0 + j < W), channels, channel_mask, x_scale, x_shift, x_mean, total, moment, X_ACT, SUMS,
        )  # fmt: skip
    if SUMS:
        row = partials + tile.to(tl.int64) * 2 * K + channels
        tl.store(row, tl.sum(total, 0), mask=channel_mask)
        tl.store(row + K, tl.sum(moment, 0), mask=channel_mask)


@triton.jit(do_not_specialize=INTEGERS)
def depthwise_wgrad_kernel(
    grad, y, y_scale, y_shift, coef, x, x_scale, x_shift, partials,
    images, c_vectors, grad_vectors, y_vectors, x_vectors, H, W, P, Q, tiles_per_program,
    Y_ACT: tl.constexpr, X_ACT: tl.constexpr, R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, VEC: tl.constexpr,
    MULTIPLIER: tl.constexpr, QT: tl.constexpr, TILE_P: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's share of one row of taps of dw (partials [programs, R * S, C]); groups are output pixels."""
    C = c_vectors * VEC
    grad_ld = grad_vectors * VEC
    y_ld = y_vectors * VEC
    x_ld = x_vectors * VEC
    tiles_c = tl.cdiv(C, BLOCK_C)
    # The programs of the R rows of taps run side by side: they read the same pixels.
    r = tl.program_id(0) % R
    program = tl.program_id(0) // R // tiles_c
    channels = tl.program_id(0) // R % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    tiles_q = tl.cdiv(Q, QT * TILE_Q)
    tiles = tl.cdiv(P, TILE_P) * tiles_q
    if y_scale is not None:
        y_scale = per_channel(y_scale, channels, channel_mask)
    if y_shift is not None:
        y_shift = per_channel(y_shift, channels, channel_mask)
    if x_scale is not None:
        x_scale = per_channel(x_scale, channels // MULTIPLIER, channel_mask)
    if x_shift is not None:
        x_shift = per_channel(x_shift, channels // MULTIPLIER, channel_mask)
    if coef is not None:
        coef = load_coefficients(coef, channels, channel_mask, C)
    dw = zeros(S, TILE_P * TILE_Q, BLOCK_C)
    for step in range(tiles_per_program):
        tile = program * tiles_per_program + step
        image = (tile // tiles).to(tl.int64)
        live = image < images
        p0, q0 = group_origin(tile % tiles, tiles_q, 1, QT, TILE_P, TILE_Q)
        dys = ()
        for j in tl.static_range(QT):
            mask = ((p0 < P) & (q0 + j < Q) & live)[:, None] & channel_mask[None, :]
            pixel = p0 * Q + q0 + j
            dy = load_gradient(
                grad + image * P * Q * grad_ld, (pixel * grad_ld)[:, None] + channels[None, :],
                y if y is None else y + image * P * Q * y_ld, (pixel * y_ld)[:, None] + channels[None, :],
                y_scale, y_shift, Y_ACT, coef, mask,
            )  # fmt: skip
            dys = dys + (dy,)
        h = p0 * SH - PH + r * DH
        for v in tl.static_range((QT - 1) * SW + (S - 1) * DW + 1):
            w = q0 * SW - PW + v
            mask = ((h >= 0) & (h < H) & (w >= 0) & (w < W) & live)[:, None] & channel_mask[None, :]
            offsets = ((h * W + w) * x_ld)[:, None] + (channels // MULTIPLIER)[None, :]
            value = tl.load(x + image * H * W * x_ld + offsets, mask=mask, other=0.0)
            value = activate(affine(value, x_scale, x_shift), X_ACT)
            value = tl.where(mask, value, 0.0)
            for j in tl.static_range(QT):
                if tap_at(0, v - j * SW, 1, S, 1, DW) >= 0:
                    dw = add_at(dw, tap_at(0, v - j * SW, 1, S, 1, DW), value * dys[j])
    row = partials + (program.to(tl.int64) * R + r) * S * C + channels
    for s in tl.static_range(S):
        tl.store(row + s * C, tl.sum(dw[s], 0), mask=channel_mask)


class Problem(NamedTuple):
    """Sizes and constants that the three kernels share, in their order."""

    images: int
    upstream: tuple
    source: tuple
    mean: Tensor | None
    lds: tuple[int, int, int]
    sizes: tuple[int, int, int, int]
    acts: tuple[int, int]
    geometry: tuple[int, ...]
    vec: int


def tiles_per_program_of(tiles: int, blocks: int) -> int:
    """About 1,056 programs (four waves of two on 132 SMs): each leaves a row of partials, so no more than needed."""
    return max(1, min(tiles * blocks // 1056, 16))


def dgrad(problem: Problem, taps: Tensor, dx: Tensor, k: int, need_sums: bool) -> Tensor | None:
    """Fills dx and returns its sums."""
    h, w, _, _ = problem.sizes
    sw = problem.geometry[3]
    qt = sw * max(1, 4 // sw)
    tile = depthwise_tile(h, w, 1, qt, k, dx.element_size(), 2 if problem.geometry[1] <= 15 else 1)
    tiles = problem.images * tile.down * tile.across
    partials = torch.empty((tiles, 2, k), dtype=torch.float32, device=dx.device) if need_sums else None
    if tiles:
        depthwise_dgrad_kernel[(tiles * cdiv(k, tile.c),)](
            *problem.upstream, *problem.source, problem.mean, taps, dx, partials,
            problem.images, k // problem.vec, *problem.lds, *problem.sizes,
            *problem.acts, *problem.geometry, problem.vec,
            taps.shape[1] // k, qt, tile.p, tile.q, tile.c, need_sums, num_warps=tile.warps,
        )  # fmt: skip
    return sum_rows(partials) if need_sums else None


def wgrad(problem: Problem, c: int, multiplier: int) -> Tensor:
    """dw as [R * S, C]."""
    _, _, p, q = problem.sizes
    r, s = problem.geometry[:2]
    tile = depthwise_tile(p, q, 1, 4, c, problem.source[0].element_size(), 2 if s <= 15 else 1)
    tiles, blocks = problem.images * tile.down * tile.across, cdiv(c, tile.c)
    per_program = tiles_per_program_of(tiles, blocks * r)
    programs = cdiv(tiles, per_program)
    partials = torch.empty((programs, r * s, c), dtype=torch.float32, device=problem.source[0].device)
    if tiles:
        depthwise_wgrad_kernel[(programs * blocks * r,)](
            *problem.upstream, *problem.source, partials,
            problem.images, c // problem.vec, *problem.lds, *problem.sizes, per_program,
            *problem.acts, *problem.geometry, problem.vec, multiplier, 4, tile.p, tile.q, tile.c,
            num_warps=tile.warps,
        )  # fmt: skip
    return sum_rows(partials)
