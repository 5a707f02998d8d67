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
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcnn import backends
from fastcnn.ops import dense_primitives
from fastcnn.ops.dense_layers import SLOTS, Block, DenseLayer, Dropout, Saved, Stage
from fastcnn.ops.dropout import ELEMENT, distribution, key_of
from fastcnn.ops.known_statistics import remember_statistics
from fastcnn.ops.layout import accumulation_dtype, autocast, to_nhwc
from fastcnn.ops.normalisation import Kind, flatten, unbiased, update_running_statistics
from fastcnn.ops.validation import check_choice, check_dense_block

MEMORY = ("fast", "min")


def _implementation(block: Block, x: Tensor, tensors: Sequence[Tensor | None]) -> ModuleType:
    """What has the forward and the backward of a whole block, for an input or a gradient and the other tensors."""
    return backends.composite("dense_block", x, block, tensors) or dense_primitives


class _DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, x, *tensors):
        stages = [Stage(*tensors[i : i + SLOTS]) for i in range(0, len(tensors), SLOTS)]
        written = _implementation(block, x, tensors).forward(block, x, stages)
        ctx.block, ctx.count = block, written.count
        ctx.dtypes = [None if t is None else t.dtype for t in (x, *tensors)]
        ctx.save_for_backward(*written.saved.tensors())
        batch = [*(written.shared or ()), *(written.own or ())]
        if written.shared and block.group is None and not torch.compiler.is_compiling():
            remember_statistics(ctx, written.out, *written.shared)
        if isinstance(ctx.count, Tensor):
            batch.append(ctx.count)
        ctx.mark_non_differentiable(*batch)
        return (written.out, *batch)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        tensors = ctx.saved_tensors
        implementation = _implementation(ctx.block, grad, tensors)
        grads = implementation.backward(ctx.block, ctx.count, grad, Saved.of(tensors), ctx.needs_input_grad[1:])
        return None, *(None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))


def _flattened(layer: DenseLayer, acc: torch.dtype) -> tuple[tuple[Kind, Kind], Stage]:
    kind1, first = flatten(layer.norm1, None, acc)
    kind2, second = flatten(layer.norm2, None, acc)
    return (kind1, kind2), Stage(layer.weight1, *first, layer.weight2, *second)


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
    drop = Dropout(distribution(float(drop_rate), ELEMENT), tuple(key_of(x) for _ in layers) if drop_rate else ())
    block = Block(kinds, drop, memory == "fast")
    count = x.numel() // max(x.shape[1], 1)
    if block.trains and count <= 1 and all(k.group is None for pair in kinds for k in pair):
        raise ValueError(f"batch statistics: got {count} value per channel, expected more than 1")
    tensors = [t for stage in stages for t in stage]
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    if not block.trains and (not differentiable or torch.compiler.is_exporting()):
        return _implementation(block, x, tensors).forward(block, x, stages, finish=True).out
    out, *batch = _DenseBlock.apply(block, x, *tensors)
    if block.trains:
        _update(block, layers, x.shape[1], batch, count)
    return out


def _update(block: Block, layers: Sequence[DenseLayer], channels: int, batch: list[Tensor], count: int) -> None:
    """Moves the running statistics of every layer that has some."""
    if len(batch) % 2:  # SyncBatchNorm's: the processes' values together, after the pairs
        *batch, count = batch
    pairs = [(mean, unbiased(var, count)) for mean, var in zip(batch[::2], batch[1::2], strict=True)]
    growth, norms, values, at = layers[0].weight2.shape[0], [], [], 0
    for i, (layer, (kind1, kind2)) in enumerate(zip(layers, block.kinds, strict=True)):
        if kind1.trains:
            norms.append(layer.norm1)
            values.append([v[: channels + growth * i] for v in pairs[0]])
        if kind2.trains:
            first, at = at, at + layer.weight1.shape[0]
            norms.append(layer.norm2)
            values.append([v[first:at] for v in pairs[-1]])
    update_running_statistics(norms, *zip(*values, strict=True))
