"""Two-stage reductions: kernels leave one row of partials per tile, and these fold the rows in a fixed order.

The order depends on the shapes alone, never on the device or on which program finished first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcnn.triton.launch import cdiv, pow2

# Rows that one program folds. Two levels are enough for 65,536 tiles, and 256 rows of 64 channels are 64 KB: some
# microseconds for one SM.
CHUNK = 256


@triton.jit
def tile_moments(y, offsets, mask, valid, partials, tile, tiles, channels, channel_mask, C, FIRST):
    """Stores mean and sum of squared deviations of the tile just stored at y + offsets, and its number of rows.

    partials is [tiles, C] means, [tiles, C] deviations, [tiles] counts. Deviations are taken from the tile's own mean:
    nothing cancels when |mean| is far above the standard deviation.

    The tile is read back (from L2) because a product's result lies in registers so that a sum over rows takes hundreds
    of shuffles, while a loaded tile has 8 channels of several rows in each thread: 391 against 16 for 128 x 128.
    """
    tl.debug_barrier()
    values = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    count = tl.sum(valid.to(tl.float32), 0)
    mean = tl.sum(values, 0) / count
    deviation = tl.where(valid[:, None], values - mean[None, :], 0.0)
    # What the mean's own rounding left over: at |mean| = 1000 std it costs the variance a digit.
    rest = tl.sum(deviation, 0) / count
    squares = tl.sum(deviation * deviation, 0) - count * rest * rest
    plane = tiles.to(tl.int64) * C
    row = partials + tile.to(tl.int64) * C + channels
    tl.store(row, mean + rest, mask=channel_mask)
    tl.store(row + plane, tl.maximum(squares, 0.0), mask=channel_mask)
    tl.store(partials + 2 * plane + tile, count, mask=FIRST)


@triton.jit(do_not_specialize=["rows", "C"])
def merge_moments_kernel(
    partials, mean_out, m2_out, count_out, rows, C,
    CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Folds CHUNK rows of moments into one (Chan, Golub & LeVeque 1979); without count_out m2_out gets the variance."""
    chunk = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    plane = rows.to(tl.int64) * C
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, CHUNK, BLOCK_ROWS):
        row = chunk * CHUNK + start + tl.arange(0, BLOCK_ROWS)
        n = tl.load(partials + 2 * plane + row, mask=row < rows, other=0.0)
        offsets = row.to(tl.int64)[:, None] * C + channels[None, :]
        mask = (row < rows)[:, None] & channel_mask[None, :]
        means = tl.load(partials + offsets, mask=mask, other=0.0)
        m2s = tl.load(partials + plane + offsets, mask=mask, other=0.0)
        block_count = tl.sum(n, 0)
        block_mean = tl.sum(n[:, None] * means, 0) / tl.maximum(block_count, 1.0)
        delta = means - block_mean[None, :]
        block_m2 = tl.sum(m2s + n[:, None] * delta * delta, 0)
        total = count + block_count
        share = block_count / tl.maximum(total, 1.0)
        delta = block_mean - mean
        mean += delta * share
        m2 += block_m2 + delta * delta * count * share
        count = total
    if count_out is None:
        m2 = m2 / count
    else:
        tl.store(count_out + chunk, count, mask=tl.program_id(1) == 0)
    offsets = chunk.to(tl.int64) * C + channels
    tl.store(mean_out + offsets, mean, mask=channel_mask)
    tl.store(m2_out + offsets, m2, mask=channel_mask)


@triton.jit(do_not_specialize=["rows", "length"])
def sum_rows_kernel(partials, out, rows, length, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_L: tl.constexpr):
    """Folds CHUNK rows of [rows, length] into one by adding."""
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_L], tl.float32)
    for start in range(0, CHUNK, BLOCK_ROWS):
        row = chunk * CHUNK + start + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (columns < length)[None, :]
        acc += tl.load(partials + row.to(tl.int64)[:, None] * length + columns[None, :], mask=mask, other=0.0)
    tl.store(out + chunk.to(tl.int64) * length + columns, tl.sum(acc, 0), mask=columns < length)


def moments_buffer(tiles: int, channels: int, like: Tensor) -> Tensor:
    """Where tile_moments leaves its rows."""
    return torch.empty(tiles * (2 * channels + 1), dtype=torch.float32, device=like.device)


def merge_moments(partials: Tensor, rows: int, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] from the moments of all tiles."""
    mean = torch.full((channels,), torch.nan, device=partials.device) if rows == 0 else partials.new_empty(channels)
    var = torch.full_like(mean, torch.nan) if rows == 0 else torch.empty_like(mean)
    if rows == 0:
        return mean, var
    block_c = pow2(channels, 16, 64)
    blocks = cdiv(channels, block_c)
    while rows > CHUNK:
        folded = cdiv(rows, CHUNK)
        out = moments_buffer(folded, channels, partials)
        plane = folded * channels
        merge_moments_kernel[(folded, blocks)](
            partials, out, out[plane:], out[2 * plane :], rows, channels, CHUNK, 16, block_c
        )
        partials, rows = out, folded
    merge_moments_kernel[(1, blocks)](partials, mean, var, None, rows, channels, pow2(rows, 16, CHUNK), 16, block_c)
    return mean, var


def sum_rows(partials: Tensor) -> Tensor:
    """The sum over the first dimension of contiguous float32 partials [rows, ...]."""
    rows = partials.shape[0]
    if rows == 0:
        return partials.new_zeros(partials.shape[1:])
    length = partials[0].numel()
    block = pow2(length, 16, 64)
    while rows > 1:
        folded = cdiv(rows, CHUNK)
        out = partials.new_empty(folded, *partials.shape[1:])
        sum_rows_kernel[(folded, cdiv(length, block))](partials, out, rows, length, pow2(rows, 16, CHUNK), 16, block)
        partials, rows = out, folded
    return partials.view(partials.shape[1:])
