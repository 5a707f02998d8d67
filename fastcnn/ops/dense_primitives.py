"""A dense block as primitives, layer by layer: what every backend runs that has no function for a whole block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn.ops import activations
from fastcnn.ops.dense_layers import SLOTS, Block, Saved, Stage, Written
from fastcnn.ops.distributed import merge_statistics, sum_over
from fastcnn.ops.layout import accumulation_dtype, empty_nhwc, to_nhwc
from fastcnn.ops.normalisation import Applied, Kind, applied, gradient_coefficients
from fastcnn.ops.registry import register
from fastcnn.ops.stages import STORE

ops = torch.ops.fastcnn
_ONE, _RELU = (1, 1), activations.RELU


@register(lambda x, channels: empty_nhwc(x.shape[0], channels, *x.shape[2:], like=x))
def widened(x: Tensor, channels: int) -> Tensor:
    """An NHWC buffer of ``channels`` channels whose first are x; the others are uninitialised."""
    buffer = empty_nhwc(x.shape[0], channels, *x.shape[2:], like=x)
    buffer[:, : x.shape[1]].copy_(x)
    return buffer


class _Statistics:
    """Mean and variance of the buffer's channels, filled as they are written; over all processes of a group."""

    def __init__(self, channels: int, group, like: Tensor) -> None:
        self.mean, self.var = (
            torch.empty(channels, dtype=accumulation_dtype(like), device=like.device) for _ in range(2)
        )
        self.group = group
        self.count = like.numel() // max(like.shape[1], 1)

    def merged(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """A batch's own statistics as those of all processes."""
        if self.group is None:
            return mean, var
        mean, var, self.count = merge_statistics(mean, var, count, self.group)
        return mean, var

    def put(self, first: int, mean: Tensor, var: Tensor) -> None:
        """Statistics of the channels from ``first`` on."""
        self.mean[first : first + len(mean)] = mean
        self.var[first : first + len(var)] = var


def _write_slice(out: Tensor, mid: Tensor, weight: Tensor, pre: Applied, act: int, how, key, stats: bool):
    """The 3x3 convolution into its slice, with dropout where there is a key; the slice's statistics."""
    head = pre.scale, pre.shift, act
    if key is None:
        return ops.conv2d_into(out, mid, weight, *head, *STORE, _ONE, _ONE, _ONE, 1, stats)
    p, scale, _ = how
    return ops.conv2d_dropout_into(out, mid, weight, *head, _ONE, _ONE, _ONE, p, scale, key, stats)


def forward(block: Block, x: Tensor, stages: Sequence[Stage], finish: bool = False) -> Written:
    """Runs the layers on a buffer of their own.

    With ``finish`` the 1x1 outputs are stored normalised and activated, and nothing is kept for backward.
    """
    acc, c, growth = accumulation_dtype(x), x.shape[1], stages[0].weight2.shape[0]
    pixels, shares = x.numel() // max(c, 1), block.shares
    buffer = ops.widened(x, c + growth * len(stages))
    statistics = _Statistics(buffer.shape[1], block.group, x)
    if shares:
        statistics.put(0, *statistics.merged(*ops.channel_statistics(buffer[:, :c]), pixels))
    mids, firsts, seconds, batch = [], [], [], []
    for i, ((kind1, kind2), s) in enumerate(zip(block.kinds, stages, strict=True)):
        prefix, out = buffer[:, :c], buffer[:, c : c + growth]
        shared = (statistics.mean[:c], statistics.var[:c]) if kind1.trains else (s.mean1, s.var1)
        first = applied(kind1, s.scale1, s.shift1, *shared, acc)
        second = None if kind2.trains else applied(kind2, s.scale2, s.shift2, s.mean2, s.var2, acc)
        tail = (second.scale, second.shift, _RELU, None) if finish else STORE
        mid, *own = ops.pointwise_fwd(prefix, s.weight1, first.scale, first.shift, _RELU, *tail, _ONE, kind2.trains)
        if kind2.trains:
            own = statistics.merged(*own, pixels)
            second = applied(kind2, s.scale2, s.shift2, *own, acc)
            batch.append(own)
        pre, act = (Applied(), activations.NONE) if finish else (second, _RELU)
        key = block.drop.keys[i] if block.drop.keys else None
        written = _write_slice(out, mid, s.weight2, pre, act, block.drop.how, key, shares)
        if shares:
            statistics.put(c, *statistics.merged(*written, pixels))
        mids.append(mid if block.keeps and not finish else None)
        firsts.append(first)
        seconds.append(second)
        c += growth
    shared = (statistics.mean, statistics.var) if shares else None
    maps = torch.cat([t for first, second in zip(firsts, seconds, strict=True) for t in (*first, *second)])
    saved = Saved(buffer, shared and shared[0], maps, mids, [(s.weight1, s.weight2) for s in stages])
    own = tuple(torch.cat(vectors) for vectors in zip(*batch, strict=True)) if batch else None
    return Written(buffer, shared, own, statistics.count, saved)


def backward(
    block: Block, count: int | Tensor, grad: Tensor, saved: Saved, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x and of the layers' tensors in the accumulation dtype, None where ``needs`` asks for none."""
    need_x, *needs = needs
    # The gradient may be anyone's: what is accumulated into is a copy.
    total = ops.affine_act_fwd(to_nhwc(grad), None, None, activations.NONE, None)
    shares = None if saved.mean is None else _Shares(saved.mean)
    norms, reads, grads = _norms(saved), saved.reads(), []
    for i in reversed(range(len(block.kinds))):
        layer = _Backward(block, count, i, reads[i], saved, total, shares)
        grads = layer.run(*norms[i], Stage(*needs[i * SLOTS : (i + 1) * SLOTS])) + grads
    dx = None
    if need_x:
        own = None if shares is None else shares.coefficients(0, reads[0])
        x = saved.buffer[:, : reads[0]]
        dx = ops.affine_act_dgrad(total[:, : reads[0]], x, None, None, activations.NONE, own, None)
    return [dx, *grads]


def _norms(saved: Saved) -> list[tuple[Applied, Applied]]:
    """Each layer's two normalisations."""
    channels = [(read, weight1.shape[0]) for read, (weight1, _) in zip(saved.reads(), saved.weights, strict=True)]
    maps = iter(saved.maps.split([4 * c for pair in channels for c in pair]))
    return [tuple(Applied(*next(maps).view(4, -1).unbind()) for _ in pair) for pair in channels]


class _Shares:
    """What batch statistics pass on to each channel from all layers that read it: slope * (x - mean) + constant.

    With x_hat = (x - mean) * r a layer's are constant = -scale * sum(dz) / M, slope = -scale * r^2 * sum(dz (x - mean)) / M.
    """

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean
        self._sums = torch.zeros((2, len(mean)), dtype=mean.dtype, device=mean.device)

    def add(self, sums: Tensor, norm: Applied, kind: Kind, count: int | Tensor) -> None:
        """A layer's, from the sums of its gradient."""
        sums = sums if kind.group is None else sum_over(sums, kind.group)
        factors = torch.stack((norm.scale, norm.scale * norm.invstd.square())).div_(-count)
        self._sums[:, : sums.shape[1]].addcmul_(sums, factors)

    def coefficients(self, first: int, last: int) -> Tensor:
        """coef [4, channels] of a gradient prologue."""
        constant, slope = self._sums[:, first:last].unbind()
        return torch.stack((torch.ones_like(slope), slope, self.mean[first:last], constant))


class _Backward(NamedTuple):
    """The backward of one layer of a block."""

    block: Block
    count: int | Tensor
    index: int
    read: int  # the channels before its slice
    saved: Saved
    total: Tensor  # the gradient so far, without what coef holds
    shares: _Shares | None

    def _upstream(self) -> tuple:
        """The gradient of the 3x3 convolution's output, as a gradient prologue."""
        own, drop = slice(self.read, self.read + self.saved.growth), self.block.drop
        grad, y = self.total[:, own], self.saved.buffer[:, own]
        coef = None if self.shares is None else self.shares.coefficients(own.start, own.stop)
        upstream = (grad, None if coef is None else y, None, None, activations.NONE, coef)
        if not drop.keys:
            return upstream
        dense = ops.affine_act_dgrad(grad, y, None, None, activations.NONE, coef, None)
        dz, _ = ops.dropout_bwd(dense, None, None, activations.NONE, *drop.how, drop.keys[self.index], False)
        return dz, None, None, None, activations.NONE, None

    def run(self, first: Applied, second: Applied, need: Stage) -> list[Tensor | None]:
        """The gradients of the layer's tensors; adds the prefix's to the buffer."""
        (kind1, kind2), (weight1, weight2) = self.block.kinds[self.index], self.saved.weights[self.index]
        prefix, mid = self.saved.buffer[:, : self.read], self.saved.mids[self.index]
        head = (first.scale, first.shift, _RELU)
        if mid is None:
            mid, _, _ = ops.pointwise_fwd(prefix, weight1, *head, *STORE, _ONE, False)
        learns2 = kind2.trains or need.scale2 or need.shift2
        dmid, dw2, sums = ops.conv2d_bwd(
            *self._upstream(), mid, second.scale, second.shift, _RELU, second.mean, weight2, None,
            _ONE, _ONE, _ONE, 1, True, need.weight2, learns2,
        )  # fmt: skip
        coef, dscale2, dshift2 = gradient_coefficients(kind2, second, sums if learns2 else None, self.count)
        learns1 = kind1.trains or need.scale1 or need.shift1
        dw1, sums = ops.pointwise_bwd_into(
            self.total[:, : self.read], dmid, mid, None, None, activations.NONE, coef, prefix, *head, first.mean,
            weight1, need.weight1, learns1,
        )  # fmt: skip
        dscale1, dshift1 = (sums[1] * first.invstd, sums[0]) if learns1 else (None, None)
        if kind1.trains:
            self.shares.add(sums, first, kind1, self.count)
        grads = Stage(dw1, dscale1, dshift1, None, None, dw2, dscale2, dshift2, None, None)
        return [g if wanted else None for g, wanted in zip(grads, need, strict=True)]
