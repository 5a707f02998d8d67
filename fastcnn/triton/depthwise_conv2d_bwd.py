"""Gradients of the depthwise convolution.

Up to 5 x 5 one kernel makes both: the gradients dy that an input pixel's dx gathers are the ones that its share of dw
multiplies with, so one pass over grad, y and x serves every tap of dw, dx and its sums. Larger kernels hold too many
taps for registers, and a depth multiplier too many gradients: there dx and dw have a kernel each, in
depthwise_conv2d_bwd_rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.ops.layout import empty_nhwc
from fastcnn.triton.activations import activate
from fastcnn.triton.depthwise_conv2d import depthwise_tile, taps_of
from fastcnn.triton.depthwise_conv2d_bwd_rows import INTEGERS, Problem, dgrad, tiles_per_program_of, wgrad
from fastcnn.triton.launch import cdiv, empty, nhwc, primitive, vector
from fastcnn.triton.prologue_epilogue import affine, load_coefficients, load_gradient, per_channel
from fastcnn.triton.reductions import sum_rows
from fastcnn.triton.stencil import add_at, adjoint_tap, first_gradient, gradients, group_origin, store_dx, zeros

Pair = tuple[int, int]


@triton.jit(do_not_specialize=INTEGERS)
def depthwise_bwd_kernel(
    grad, y, y_scale, y_shift, coef, x, x_scale, x_shift, x_mean, taps, dx, partials,
    images, c_vectors, grad_vectors, y_vectors, x_vectors, H, W, P, Q, tiles_per_program,
    Y_ACT: tl.constexpr, X_ACT: tl.constexpr, R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, VEC: tl.constexpr,
    PT: tl.constexpr, QT: tl.constexpr, TILE_P: tl.constexpr, TILE_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    DX: tl.constexpr, DW_ROWS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """dx and the program's share of dw and sums, partials [programs, DW_ROWS + 2 SUMS, C]; groups are input pixels.

    dx[h, w] = x_act' sum over r, s of dy[p, q] taps[r, s]        with p SH = h + PH - r DH, q SW = w + PW - s DW
    dw[r, s] = sum over h, w of dy[p, q] prologue(x[h, w])        the same dy
    PT and QT are multiples of the strides, so which tap meets which pixel is known at compile time.
    """
    C = c_vectors * VEC
    grad_ld = grad_vectors * VEC
    y_ld = y_vectors * VEC
    x_ld = x_vectors * VEC
    tiles_c = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0) // tiles_c
    channels = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    tiles_q = tl.cdiv(W, QT * TILE_Q)
    tiles = tl.cdiv(H, PT * TILE_P) * tiles_q
    if y_scale is not None:
        y_scale = per_channel(y_scale, channels, channel_mask)
    if y_shift is not None:
        y_shift = per_channel(y_shift, channels, channel_mask)
    if x_scale is not None:
        x_scale = per_channel(x_scale, channels, channel_mask)
    if x_shift is not None:
        x_shift = per_channel(x_shift, channels, channel_mask)
    if x_mean is not None:
        x_mean = per_channel(x_mean, channels, channel_mask)
    if coef is not None:
        coef = load_coefficients(coef, channels, channel_mask, C)
    dw = zeros(DW_ROWS, TILE_P * TILE_Q, BLOCK_C)
    total = tl.zeros([TILE_P * TILE_Q, BLOCK_C], tl.float32)
    moment = tl.zeros([TILE_P * TILE_Q, BLOCK_C], tl.float32)

    for step in range(tiles_per_program):
        tile = program * tiles_per_program + step
        image = (tile // tiles).to(tl.int64)
        live = image < images
        h0, w0 = group_origin(tile % tiles, tiles_q, PT, QT, TILE_P, TILE_Q)
        x_image = x + image * H * W * x_ld
        a = ()
        for k in tl.static_range(PT * QT if DW_ROWS > 0 else 0):
            h = h0 + k // QT
            w = w0 + k % QT
            mask = ((h < H) & (w < W) & live)[:, None] & channel_mask[None, :]
            value = tl.load(x_image + ((h * W + w) * x_ld)[:, None] + channels[None, :], mask=mask, other=0.0)
            value = activate(affine(value, x_scale, x_shift), X_ACT)
            a = a + (tl.where(mask, value, 0.0),)
        acc = zeros(PT * QT, TILE_P * TILE_Q, BLOCK_C)
        for du in tl.static_range(gradients(PH, SH, DH, R, PT)):
            for dv in tl.static_range(gradients(PW, SW, DW, S, QT)):
                p = h0 // SH + du + first_gradient(PH, SH, DH, R)
                q = w0 // SW + dv + first_gradient(PW, SW, DW, S)
                mask = ((p >= 0) & (p < P) & (q >= 0) & (q < Q) & live)[:, None] & channel_mask[None, :]
                pixel = p * Q + q
                dy = load_gradient(
                    grad + image * P * Q * grad_ld, (pixel * grad_ld)[:, None] + channels[None, :],
                    y if y is None else y + image * P * Q * y_ld, (pixel * y_ld)[:, None] + channels[None, :],
                    y_scale, y_shift, Y_ACT, coef, mask,
                )  # fmt: skip
                for k in tl.static_range(PT * QT):
                    if adjoint_tap(k // QT, k % QT, du, dv, R, S, SH, SW, PH, PW, DH, DW) >= 0:
                        if DX:
                            tap = per_channel(
                                taps + adjoint_tap(k // QT, k % QT, du, dv, R, S, SH, SW, PH, PW, DH, DW) * C,
                                channels, channel_mask,
                            )  # fmt: skip
                            acc = acc[:k] + (acc[k] + dy * tap,) + acc[k + 1 :]
                        if DW_ROWS > 0:
                            dw = add_at(
                                dw, adjoint_tap(k // QT, k % QT, du, dv, R, S, SH, SW, PH, PW, DH, DW), dy * a[k]
                            )
        if DX:
            for k in tl.static_range(PT * QT):
                h = h0 + k // QT
                w = w0 + k % QT
                total, moment = store_dx(
                    acc[k], x_image, dx + image * H * W * C, x_ld, C, h * W + w, (h < H) & (w < W) & live,
                    channels, channel_mask, x_scale, x_shift, x_mean, total, moment, X_ACT, SUMS,
                )  # fmt: skip

    row = partials + program.to(tl.int64) * (DW_ROWS + 2 * SUMS) * C + channels
    for t in tl.static_range(DW_ROWS):
        tl.store(row + t * C, tl.sum(dw[t], 0), mask=channel_mask)
    if SUMS:
        tl.store(row + DW_ROWS * C, tl.sum(total, 0), mask=channel_mask)
        tl.store(row + (DW_ROWS + 1) * C, tl.sum(moment, 0), mask=channel_mask)


def both(problem: Problem, taps: Tensor | None, dx: Tensor | None, k: int, need_dw: bool, need_sums: bool):
    """dw as [R * S, C] and sums from depthwise_bwd_kernel, which fills dx."""
    h, w, _, _ = problem.sizes
    r, s, sh, sw = problem.geometry[:4]
    # The taps of dw hold as many registers as dx and the inputs together: 2 channels a thread (5 x 5: 1), and no
    # second row of pixels unless the stride asks.
    pt, qt = sh, sw * max(1, 4 // sw)
    tile = depthwise_tile(h, w, pt, qt, k, problem.source[0].element_size(), 2 if r * s <= 9 else 1)
    tiles, blocks = problem.images * tile.down * tile.across, cdiv(k, tile.c)
    per_program = tiles_per_program_of(tiles, blocks)
    programs, rows = cdiv(tiles, per_program), (r * s if need_dw else 0)
    partials = torch.empty((programs, rows + 2 * need_sums, k), dtype=torch.float32, device=problem.source[0].device)
    if tiles:
        depthwise_bwd_kernel[(programs * blocks,)](
            *problem.upstream, *problem.source, problem.mean, taps, dx, partials,
            problem.images, k // problem.vec, *problem.lds, *problem.sizes, per_program,
            *problem.acts, *problem.geometry, problem.vec, pt, qt, tile.p, tile.q, tile.c,
            dx is not None, rows, need_sums, num_warps=tile.warps,
        )  # fmt: skip
    if not (rows or need_sums):
        return None, None
    folded = sum_rows(partials)
    return folded[:rows], folded[rows:]


@primitive
def depthwise_bwd(
    grad: Tensor,
    y: Tensor | None,
    y_scale: Tensor | None,
    y_shift: Tensor | None,
    y_act: int,
    coef: Tensor | None,
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_act: int,
    x_mean: Tensor | None,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    need_dx: bool,
    need_dw: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of depthwise_fwd. Returns dx, dw [K * multiplier, 1, R, S], sums."""
    grad, grad_ld = nhwc(grad)
    y, y_ld = nhwc(y)
    x, x_ld = nhwc(x)
    (n, k, h, w), (c, _, r, s), (p, q) = x.shape, weight.shape, grad.shape[2:]
    vec = vector(k, x_ld, grad_ld, y_ld)
    problem = Problem(
        n, (grad, y, y_scale, y_shift, coef), (x, x_scale, x_shift), x_mean,
        (grad_ld // vec, y_ld // vec, x_ld // vec), (h, w, p, q), (y_act, x_act),
        (r, s, *stride, *padding, *dilation), vec,
    )  # fmt: skip
    need_sums = need_sums and need_dx
    dx = empty_nhwc(n, k, h, w, like=grad) if need_dx else None
    taps = taps_of(weight, x) if need_dx else None
    if r * s <= 25 and c == k:
        dw, sums = both(problem, taps, dx, k, need_dw, need_sums)
    else:
        sums = dgrad(problem, taps, dx, k, need_sums) if need_dx else None
        dw = wgrad(problem, c, c // k) if need_dw else None
    return (
        dx if need_dx else grad.new_empty(0),
        dw.t().contiguous().view(weight.shape) if need_dw else empty(x),
        sums if need_sums else empty(x),
    )
