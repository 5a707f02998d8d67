"""A dense block in one buffer: every layer reads its prefix of channels and writes its slice of them in place.

Layer l computes conv2(relu(bn2(conv1(relu(bn1(prefix)))))) with a 1x1 conv1 and a 3x3 conv2. Batch statistics of a channel
do not depend on which layer reads it, so each slice's are taken once, as it is written, and shared by all later layers:
O(layers) passes where a BatchNorm per layer makes O(layers^2). Nothing is concatenated.

Backward accumulates into one buffer like the forward's. Through layer j's BatchNorm the gradient of a channel is

    dx_j = scale_j dz_j + slope_j (x - mean) + constant_j          (gradient_coefficients)

and mean is the same for all j. The first term is added to the buffer by the 1x1 product's store; slopes and constants are
sums per channel, applied once, when the slice's own convolution reads its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcnn.ops import activations
from fastcnn.ops.distributed import merge_statistics, sum_over
from fastcnn.ops.dropout import ELEMENT, distribution, key_of
from fastcnn.ops.known_statistics import remember_statistics
from fastcnn.ops.layout import accumulation_dtype, autocast, empty_nhwc, to_nhwc
from fastcnn.ops.normalisation import (
    Applied,
    BatchNorm,
    Kind,
    applied,
    flatten,
    gradient_coefficients,
    update_running_statistics,
)
from fastcnn.ops.registry import register
from fastcnn.ops.stages import STORE
from fastcnn.ops.validation import check_choice, check_dense_block

MEMORY = ("fast", "min")

ops = torch.ops.fastcnn
_ONE, _RELU = (1, 1), activations.RELU


class DenseLayer(NamedTuple):
    """One layer: weight1 [M, prefix, 1, 1] and weight2 [growth, M, 3, 3], each after its normalisation and ReLU."""

    norm1: BatchNorm
    weight1: Tensor
    norm2: BatchNorm
    weight2: Tensor


class Dropout(NamedTuple):
    """Inverted dropout of each layer's output: p, scale and unit (dropout.distribution), and each layer's key [2]."""

    how: tuple[float, float, int]
    keys: tuple[Tensor, ...] = ()


class _Stage(NamedTuple):
    """A layer's tensors."""

    weight1: Tensor
    scale1: Tensor | None
    shift1: Tensor | None
    mean1: Tensor | None
    var1: Tensor | None
    weight2: Tensor
    scale2: Tensor | None
    shift2: Tensor | None
    mean2: Tensor | None
    var2: Tensor | None


_SLOTS = len(_Stage._fields)


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


def _forward(x: Tensor, kinds, stages: Sequence[_Stage], drop: Dropout, statistics: _Statistics | None, finish: bool):
    """The buffer, the 1x1 outputs, their normalisations and those of the prefixes.

    With ``finish`` the 1x1 outputs are stored normalised and activated, and not kept.
    """
    acc, c, growth = accumulation_dtype(x), x.shape[1], stages[0].weight2.shape[0]
    pixels = x.numel() // max(c, 1)
    buffer = ops.widened(x, c + growth * len(stages))
    shares = statistics is not None and any(kind1.trains for kind1, _ in kinds)
    if shares:
        statistics.put(0, *statistics.merged(*ops.channel_statistics(buffer[:, :c]), pixels))
    mids, firsts, seconds, batch = [], [], [], []
    for i, ((kind1, kind2), s) in enumerate(zip(kinds, stages, strict=True)):
        prefix, out = buffer[:, :c], buffer[:, c : c + growth]
        shared = (statistics.mean[:c], statistics.var[:c]) if kind1.trains else (s.mean1, s.var1)
        first = applied(kind1, s.scale1, s.shift1, *shared, acc)
        second = None if kind2.trains else applied(kind2, s.scale2, s.shift2, s.mean2, s.var2, acc)
        tail = (second.scale, second.shift, _RELU, None) if finish else STORE
        mid, *own = ops.pointwise_fwd(prefix, s.weight1, first.scale, first.shift, _RELU, *tail, _ONE, kind2.trains)
        if kind2.trains:
            own = statistics.merged(*own, pixels)
            second = applied(kind2, s.scale2, s.shift2, *own, acc)
            batch += own
        pre, act = (Applied(), activations.NONE) if finish else (second, _RELU)
        key = drop.keys[i] if drop.keys else None
        written = _write_slice(out, mid, s.weight2, pre, act, drop.how, key, shares)
        if shares:
            statistics.put(c, *statistics.merged(*written, pixels))
        if not finish:
            mids.append(mid)
        firsts.append(first)
        seconds.append(second)
        c += growth
    return buffer, mids, firsts, seconds, batch


class _DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kinds, drop, keeps, x, *tensors):
        stages = [_Stage(*tensors[i : i + _SLOTS]) for i in range(0, len(tensors), _SLOTS)]
        group = next((k.group for pair in kinds for k in pair if k.trains), None)
        trains = any(k.trains for pair in kinds for k in pair)
        shares = any(kind1.trains for kind1, _ in kinds)  # only a layer's first BatchNorm reads the slices' statistics
        growth = stages[0].weight2.shape[0]
        channels = x.shape[1] + growth * len(stages)
        statistics = _Statistics(channels, group, x) if trains else None
        buffer, mids, firsts, seconds, batch = _forward(x, kinds, stages, drop, statistics, False)
        ctx.kinds, ctx.drop, ctx.keeps = kinds, drop, keeps
        ctx.total = statistics.count if trains else x.numel() // max(x.shape[1], 1)
        shared = [statistics.mean, statistics.var] if shares else [None, None]
        norms = [t for norm in (*firsts, *seconds) for t in norm]
        ctx.save_for_backward(buffer, *shared, *(mids if keeps else [None] * len(mids)), *norms, *tensors)
        batch = [*(t for t in shared if t is not None), *batch]
        if shares and group is None and not torch.compiler.is_compiling():
            remember_statistics(ctx, buffer, statistics.mean, statistics.var)
        if isinstance(ctx.total, Tensor):
            batch.append(ctx.total)
        ctx.mark_non_differentiable(*batch)
        return (buffer, *batch)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        n = len(ctx.kinds)
        buffer, mean, _, *rest = ctx.saved_tensors
        mids, norms, tensors = rest[:n], rest[n : n + 8 * n], rest[n + 8 * n :]
        norms = [Applied(*norms[i : i + 4]) for i in range(0, 8 * n, 4)]
        stages = [_Stage(*tensors[i : i + _SLOTS]) for i in range(0, len(tensors), _SLOTS)]
        needs = [ctx.needs_input_grad[4 + i : 4 + i + _SLOTS] for i in range(0, len(tensors), _SLOTS)]
        # The gradient may be anyone's: what is accumulated into is a copy.
        total = ops.affine_act_fwd(to_nhwc(grad), None, None, activations.NONE, None)
        shares = None if mean is None else _Shares(mean)
        growth, grads = stages[0].weight2.shape[0], []
        for i in reversed(range(n)):
            c = buffer.shape[1] - growth * (n - i)
            layer = _Backward(ctx, i, c, growth, buffer, total, shares)
            grads = layer.run(stages[i], mids[i], norms[i], norms[n + i], needs[i]) + grads
        dx = None
        if ctx.needs_input_grad[3]:
            c = buffer.shape[1] - growth * n
            own = None if shares is None else shares.coefficients(0, c)
            dx = ops.affine_act_dgrad(total[:, :c], buffer[:, :c], None, None, activations.NONE, own, None)
        return None, None, None, dx, *grads


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
    """The backward of one layer of a block, whose slice begins at channel c."""

    ctx: object
    index: int
    c: int
    growth: int
    buffer: Tensor
    total: Tensor  # the gradient so far, without what coef holds
    shares: _Shares | None

    def _upstream(self) -> tuple:
        """The gradient of the 3x3 convolution's output, as a gradient prologue."""
        own = slice(self.c, self.c + self.growth)
        grad, y = self.total[:, own], self.buffer[:, own]
        coef = None if self.shares is None else self.shares.coefficients(own.start, own.stop)
        upstream = (grad, None if coef is None else y, None, None, activations.NONE, coef)
        if not self.ctx.drop.keys:
            return upstream
        dense = ops.affine_act_dgrad(grad, y, None, None, activations.NONE, coef, None)
        key = self.ctx.drop.keys[self.index]
        dz, _ = ops.dropout_bwd(dense, None, None, activations.NONE, *self.ctx.drop.how, key, False)
        return dz, None, None, None, activations.NONE, None

    def run(self, s: _Stage, mid: Tensor | None, first: Applied, second: Applied, needs: Sequence[bool]) -> list:
        """The gradients of the layer's tensors; adds the prefix's to the buffer."""
        kind1, kind2 = self.ctx.kinds[self.index]
        prefix, need = self.buffer[:, : self.c], _Stage(*needs)
        head = (first.scale, first.shift, _RELU)
        if mid is None:
            mid, _, _ = ops.pointwise_fwd(prefix, s.weight1, *head, *STORE, _ONE, False)
        learns2 = kind2.trains or need.scale2 or need.shift2
        dmid, dw2, sums = ops.conv2d_bwd(
            *self._upstream(), mid, second.scale, second.shift, _RELU, second.mean, s.weight2, None,
            _ONE, _ONE, _ONE, 1, True, need.weight2, learns2,
        )  # fmt: skip
        coef, dscale2, dshift2 = gradient_coefficients(kind2, second, sums if learns2 else None, self.ctx.total)
        learns1 = kind1.trains or need.scale1 or need.shift1
        dw1, sums = ops.pointwise_bwd_into(
            self.total[:, : self.c], dmid, mid, None, None, activations.NONE, coef, prefix, *head, first.mean,
            s.weight1, need.weight1, learns1,
        )  # fmt: skip
        dscale1, dshift1 = (sums[1] * first.invstd, sums[0]) if learns1 else (None, None)
        if kind1.trains:
            self.shares.add(sums, first, kind1, self.ctx.total)
        grads = _Stage(dw1, dscale1, dshift1, None, None, dw2, dscale2, dshift2, None, None)
        return [g.to(t.dtype) if wanted else None for g, t, wanted in zip(grads, s, needs, strict=True)]


def _flattened(layer: DenseLayer, acc: torch.dtype) -> tuple[tuple[Kind, Kind], _Stage]:
    kind1, first = flatten(layer.norm1, None, acc)
    kind2, second = flatten(layer.norm2, None, acc)
    return (kind1, kind2), _Stage(layer.weight1, *first, layer.weight2, *second)


def dense_block(x: Tensor, layers: Sequence[DenseLayer], drop_rate: float = 0.0, memory: str = "fast") -> Tensor:
    """A DenseNet's block in one buffer, differentiable: x, then every layer's output, along the channels.

    Running statistics are updated in place. For backward the buffer and the layers' 1x1 outputs are kept; with
    ``memory="min"`` the latter are computed again. ``drop_rate`` is the probability of dropout after every layer; torch's
    generator seeds it.

    Shapes: x [N, K, H, W] in any memory format, weight1 of layer l [M, K + l * growth, 1, 1], weight2 [growth, M, 3, 3];
    the result [N, K + layers * growth, H, W] is channels_last. Dtypes: float32, bfloat16, float16, float64 (reference);
    autocast is respected, parameters may stay float32.
    Source: DenseNet (arXiv 1608.06993, section 3), its shared storage (arXiv 1707.06990).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device (validation.check_dense_block).
        ValueError: batch statistics of a single value per channel.
    """
    check_choice(memory, "memory", MEMORY)
    check_dense_block(x, layers, drop_rate)
    x = to_nhwc(autocast(x))
    acc = accumulation_dtype(x)
    kinds, stages = zip(*(_flattened(layer, acc) for layer in layers), strict=True)
    trains = any(k.trains for pair in kinds for k in pair)
    count = x.numel() // max(x.shape[1], 1)
    if trains and count <= 1 and all(k.group is None for pair in kinds for k in pair):
        raise ValueError(f"batch statistics: got {count} value per channel, expected more than 1")
    drop = Dropout(distribution(float(drop_rate), ELEMENT), tuple(key_of(x) for _ in layers) if drop_rate else ())
    tensors = [t for stage in stages for t in stage]
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    if not trains and (not differentiable or torch.compiler.is_exporting()):
        return _forward(x, kinds, stages, drop, None, True)[0]
    out, *batch = _DenseBlock.apply(kinds, drop, memory == "fast", x, *tensors)
    if trains:
        _update(layers, kinds, x.shape[1], batch, count)
    return out


def _update(layers: Sequence[DenseLayer], kinds, channels: int, batch: list[Tensor], count: int) -> None:
    """Moves the running statistics of every layer that has some."""
    if len(batch) % 2:  # SyncBatchNorm's: the processes' values together, after the pairs
        *batch, count = batch
    own = iter(zip(batch[::2], batch[1::2], strict=True))
    mean, var = next(own) if any(kind1.trains for kind1, _ in kinds) else (None, None)
    growth = layers[0].weight2.shape[0]
    for i, (layer, (kind1, kind2)) in enumerate(zip(layers, kinds, strict=True)):
        c = channels + growth * i
        if kind1.trains:
            update_running_statistics(layer.norm1, None, mean[:c], var[:c], count)
        if kind2.trains:
            update_running_statistics(layer.norm2, None, *next(own), count)
