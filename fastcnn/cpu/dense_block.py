"""The dense block on the C++ core: its buffer, and all its layers as one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.affine_act import affine_act_into
from fastcnn.cpu.arguments import DTYPE_CODES, pointer
from fastcnn.cpu.conv2d import weight_layout
from fastcnn.cpu.memory import empty_nhwc
from fastcnn.cpu.packing import source
from fastcnn.ops.dense_layers import SLOTS, Block, Stage, Written
from fastcnn.ops.layout import pixel_stride, to_nhwc
from fastcnn.ops.normalisation import Kind

_PLAIN = (Tensor, torch.nn.Parameter)
_NO_LAYOUT = (0,) * 6


def widened(x: Tensor, channels: int) -> Tensor:
    """As fastcnn.ops.dense_primitives.widened."""
    n, k, h, w = x.shape
    buffer = empty_nhwc(n, channels, h, w, like=x)
    affine_act_into(buffer[:, :k], x, None, None, 0, None)
    return buffer


def refuses(x: Tensor, block: Block, tensors: Sequence[Tensor | None]) -> bool:
    """Whether a block has to run as primitives."""
    if block.drop.keys or block.group is not None or x.dtype not in DTYPE_CODES:
        return True
    return not all(t is None or (type(t) in _PLAIN and t.layout is torch.strided) for t in (x, *tensors))


def _readable(stage: Stage) -> Stage:
    """A layer's tensors as the kernels read them."""
    return Stage(*(source(t) if name.startswith("weight") else _vector(t) for name, t in zip(Stage._fields, stage)))


def _vector(v: Tensor | None) -> Tensor | None:
    return v if v is None or (v.dtype is torch.float32 and v.is_contiguous()) else v.detach().float().contiguous()


def _norm(kind: Kind, maps: int, vectors: Sequence[Tensor | None] = ()) -> tuple:
    """A DenseNorm, whose map is at an address; a backward reads only that."""
    return (*map(pointer, vectors or (None,) * 4), kind.eps, kind.trains, maps)


def _map_addresses(maps: Tensor, channels: int, growth: int, middles: Sequence[int]) -> list[tuple[int, int]]:
    """Where the maps [4, channels] of each layer's two normalisations are."""
    places, at = [], maps.data_ptr()
    for i, middle in enumerate(middles):
        second = at + 16 * (channels + growth * i)
        places.append((at, second))
        at = second + 16 * middle
    return places


def _block(buffer: Tensor, channels: int, growth: int) -> tuple:
    """A DenseBlock without its layers."""
    n, _, h, w = buffer.shape
    return n, h, w, channels, growth, DTYPE_CODES[buffer.dtype], buffer.data_ptr()


def forward(block: Block, x: Tensor, stages: Sequence[Stage], finish: bool = False) -> Written:
    """As fastcnn.ops.dense_primitives.forward."""
    n, channels, h, w = x.shape
    growth, middles = stages[0].weight2.shape[0], [s.weight1.shape[0] for s in stages]
    buffer = widened(x, channels + growth * len(stages))
    maps = torch.empty(4 * (sum(range(channels, buffer.shape[1], growth)) + sum(middles)), dtype=torch.float32)
    keeps = block.keeps and not finish
    mids = [empty_nhwc(n, middle, h, w, like=x) for middle in (middles if keeps else [max(middles)])]
    trained = sum(m for m, (_, kind2) in zip(middles, block.kinds, strict=True) if kind2.trains)
    shared = _pair(buffer.shape[1]) if block.shares else None
    own = _pair(trained) if trained else None
    readable, layers, at = [_readable(s) for s in stages], [], [0, 0] if own is None else [t.data_ptr() for t in own]
    for i, (s, places) in enumerate(zip(readable, _map_addresses(maps, channels, growth, middles), strict=True)):
        kind1, kind2 = block.kinds[i]
        layers.append((
            _norm(kind1, places[0], s[1:5]), weight_layout(s.weight1),
            _norm(kind2, places[1], s[6:10]), weight_layout(s.weight2),
            middles[i], mids[i if keeps else 0].data_ptr(), *at,
        ))  # fmt: skip
        if kind2.trains:
            at = [address + 4 * middles[i] for address in at]
    native.module().dense_block_forward(
        _block(buffer, channels, growth), layers, *map(pointer, shared or (None, None)), finish
    )
    kept = mids if keeps else [None] * len(mids)
    weights = [t for s in stages for t in (s.weight1, s.weight2)]
    saved = [buffer, shared[0] if shared else None, maps, *kept, *weights]
    return Written(buffer, shared, own, x.numel() // channels, saved)


def _pair(channels: int) -> tuple[Tensor, Tensor]:
    """Room for means and variances."""
    return torch.empty(channels, dtype=torch.float32), torch.empty(channels, dtype=torch.float32)


class _Gradients:
    """Room for the gradients of a layer's tensors that are asked for, and for the sums that they come from."""

    def __init__(self, kinds: tuple[Kind, Kind], weight1: Tensor, weight2: Tensor, need: Stage) -> None:
        middle, read = weight1.shape[:2]
        self._need = need
        self._dw1 = torch.empty(weight1.shape, dtype=torch.float32) if need.weight1 else None
        self._dw2 = torch.empty_like(weight2, dtype=torch.float32) if need.weight2 else None
        self._sums1 = _sums(kinds[0].trains or need.scale1 or need.shift1, read)
        self._sums2 = _sums(kinds[1].trains or need.scale2 or need.shift2, middle)
        self._dscale1 = torch.empty(read, dtype=torch.float32) if need.scale1 else None
        self._dscale2 = torch.empty(middle, dtype=torch.float32) if need.scale2 else None

    def arguments(self) -> tuple:
        """A DenseLayerGradient."""
        layout = _NO_LAYOUT if self._dw2 is None else weight_layout(self._dw2)
        first, second = (self._dw1, self._sums1, self._dscale1), (self._sums2, self._dscale2)
        return (*map(pointer, first), pointer(self._dw2), layout, *map(pointer, second))

    def stage(self) -> Stage:
        """The gradients where the tensors are."""
        dshift1 = self._sums1[0] if self._need.shift1 else None
        dshift2 = self._sums2[0] if self._need.shift2 else None
        return Stage(self._dw1, self._dscale1, dshift1, None, None, self._dw2, self._dscale2, dshift2, None, None)


def _sums(wanted: bool, channels: int) -> Tensor | None:
    return torch.empty((2, channels), dtype=torch.float32) if wanted else None


def backward(
    block: Block, count: int, grad: Tensor, saved: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """As fastcnn.ops.dense_primitives.backward."""
    layers_count = len(block.kinds)
    buffer, mean, maps, *rest = saved
    # Whoever keeps saved tensors elsewhere may give them back in another layout.
    buffer, *mids = (_dense(t) for t in (buffer, *rest[: -2 * layers_count]))
    weights = [source(t) for t in rest[-2 * layers_count :]]
    weights1, weights2 = weights[::2], weights[1::2]
    n, total_channels, h, w = buffer.shape
    growth, middles = weights2[0].shape[0], [t.shape[0] for t in weights1]
    channels, need_x = total_channels - growth * layers_count, needs[0]
    room = empty_nhwc(n, max(middles), h, w, like=buffer)
    repeated = None if block.keeps else empty_nhwc(n, max(middles), h, w, like=buffer)
    layers, gradients = [], []
    for i, places in enumerate(_map_addresses(maps, channels, growth, middles)):
        mid = mids[i] if block.keeps else repeated
        norms = (_norm(kind, at) for kind, at in zip(block.kinds[i], places, strict=True))
        (norm1, norm2), (w1, w2) = norms, (weights1[i], weights2[i])
        layers.append((norm1, weight_layout(w1), norm2, weight_layout(w2), middles[i], mid.data_ptr(), 0, 0))
        need = Stage(*needs[1 + SLOTS * i : 1 + SLOTS * (i + 1)])
        gradients.append(_Gradients(block.kinds[i], w1, w2, need))
    # The gradient may be anyone's: what is accumulated into is memory of its own.
    grad, total = to_nhwc(grad), empty_nhwc(*buffer.shape, like=buffer)
    dx = empty_nhwc(n, channels, h, w, like=buffer) if need_x else None
    native.module().dense_block_backward(
        _block(buffer, channels, growth), layers, pointer(mean), not block.keeps,
        [own.arguments() for own in gradients], grad.data_ptr(), pixel_stride(grad),
        total.data_ptr(), room.data_ptr(), pointer(dx),
    )  # fmt: skip
    return [dx, *(grad for own in gradients for grad in own.stage())]


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)
