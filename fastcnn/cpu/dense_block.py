"""The dense block on the C++ core: its buffer, and all its layers as one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.affine_act import affine_act_into
from fastcnn.cpu.arguments import DTYPE_CODES, floats, pointer, statistics
from fastcnn.cpu.conv2d import weight_layout
from fastcnn.cpu.memory import empty_nhwc
from fastcnn.cpu.packing import source
from fastcnn.ops.dense_layers import SLOTS, Block, Saved, Stage, Written
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
    """Whether a block has to run as primitives: what it needs is torch's, or its tensors are more than memory."""
    if block.drop.keys or block.group is not None or x.dtype not in DTYPE_CODES or x.device.type != "cpu":
        return True
    return not all(t is None or _is_plain(t) for t in (x, *tensors))


def _is_plain(t: Tensor) -> bool:
    return type(t) in _PLAIN and t.layout is torch.strided and not t.is_neg() and not t._is_zerotensor()


def _readable(stage: Stage) -> Stage:
    """A layer's tensors as the kernels read them."""
    return Stage(*(source(t) if name.startswith("weight") else floats(t) for name, t in zip(Stage._fields, stage)))


def _norm(kind: Kind, maps: int, vectors: Sequence[Tensor | None] = ()) -> tuple:
    """A DenseNorm, whose map is at an address; a backward reads only that."""
    return (*map(pointer, vectors or (None,) * 4), kind.eps, kind.trains, maps)


def _map_addresses(saved: Saved) -> list[tuple[int, int]]:
    """Where the maps of each layer's two normalisations are."""
    places, at = [], saved.maps.data_ptr()
    for read, (weight1, _) in zip(saved.reads(), saved.weights, strict=True):
        second = at + 16 * read
        places.append((at, second))
        at = second + 16 * weight1.shape[0]
    return places


def _block(saved: Saved) -> tuple:
    """A DenseBlock without its layers."""
    n, _, h, w = saved.buffer.shape
    return n, h, w, saved.reads()[0], saved.growth, DTYPE_CODES[saved.buffer.dtype], saved.buffer.data_ptr()


def forward(block: Block, x: Tensor, stages: Sequence[Stage], finish: bool = False) -> Written:
    """As fastcnn.ops.dense_primitives.forward."""
    n, channels, h, w = x.shape
    growth, middles = stages[0].weight2.shape[0], [s.weight1.shape[0] for s in stages]
    buffer = widened(x, channels + growth * len(stages))
    maps = x.new_empty(4 * (sum(range(channels, buffer.shape[1], growth)) + sum(middles)), dtype=torch.float32)
    keeps = block.keeps and not finish
    room = [empty_nhwc(n, middle, h, w, like=x) for middle in (middles if keeps else [max(middles)])]
    shared = statistics(buffer.shape[1], True, x) if block.shares else None
    trained = sum(m for m, (_, kind2) in zip(middles, block.kinds, strict=True) if kind2.trains)
    own = statistics(trained, True, x) if trained else None
    mids = room if keeps else [None] * len(stages)
    saved = Saved(buffer, shared and shared[0], maps, mids, [(s.weight1, s.weight2) for s in stages])
    readable, layers = [_readable(s) for s in stages], []
    mean, var = map(pointer, own or (None, None))
    for i, (s, places) in enumerate(zip(readable, _map_addresses(saved), strict=True)):
        kind1, kind2 = block.kinds[i]
        layers.append((
            _norm(kind1, places[0], s[1:5]), weight_layout(s.weight1),
            _norm(kind2, places[1], s[6:10]), weight_layout(s.weight2),
            middles[i], room[i if keeps else 0].data_ptr(), mean, var,
        ))  # fmt: skip
        if kind2.trains:
            mean, var = mean + 4 * middles[i], var + 4 * middles[i]
    native.module().dense_block_forward(_block(saved), layers, *map(pointer, shared or (None, None)), finish)
    return Written(buffer, shared, own, x.numel() // channels, saved)


class _Gradients:
    """Room for the gradients of a layer's tensors that are asked for, and for the sums that they come from."""

    def __init__(self, kinds: tuple[Kind, Kind], weight1: Tensor, weight2: Tensor, need: Stage) -> None:
        middle, read = weight1.shape[:2]
        self._need = need
        self._dw1 = _empty(need.weight1, weight1, weight1.shape)
        self._dw2 = torch.empty_like(weight2, dtype=torch.float32) if need.weight2 else None
        self._sums1 = _empty(kinds[0].trains or need.scale1 or need.shift1, weight1, (2, read))
        self._sums2 = _empty(kinds[1].trains or need.scale2 or need.shift2, weight1, (2, middle))
        self._dscale1 = _empty(need.scale1, weight1, (read,))
        self._dscale2 = _empty(need.scale2, weight1, (middle,))

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


def _empty(wanted: bool, like: Tensor, shape: Sequence[int]) -> Tensor | None:
    return torch.empty(shape, dtype=torch.float32, device=like.device) if wanted else None


def _as_kept(saved: Saved) -> Saved:
    """In the layout of the forward: whoever keeps saved tensors elsewhere may give them back in another one."""
    buffer, *mids = (
        None if t is None else t.contiguous(memory_format=torch.channels_last) for t in (saved[0], *saved.mids)
    )
    weights = [(source(weight1), source(weight2)) for weight1, weight2 in saved.weights]
    return Saved(buffer, floats(saved.mean), floats(saved.maps), mids, weights)


def backward(block: Block, count: int, grad: Tensor, saved: Saved, needs: Sequence[bool]) -> list[Tensor | None]:
    """As fastcnn.ops.dense_primitives.backward."""
    saved = _as_kept(saved)
    n, _, h, w = saved.buffer.shape
    widest = max(weight1.shape[0] for weight1, _ in saved.weights)
    dmid = empty_nhwc(n, widest, h, w, like=saved.buffer)
    repeated = None if block.keeps else empty_nhwc(n, widest, h, w, like=saved.buffer)
    layers, gradients = [], []
    for i, (place1, place2) in enumerate(_map_addresses(saved)):
        (kind1, kind2), (weight1, weight2) = block.kinds[i], saved.weights[i]
        layers.append((
            _norm(kind1, place1), weight_layout(weight1), _norm(kind2, place2), weight_layout(weight2),
            weight1.shape[0], pointer(saved.mids[i] if block.keeps else repeated), 0, 0,
        ))  # fmt: skip
        need = Stage(*needs[1 + SLOTS * i : 1 + SLOTS * (i + 1)])
        gradients.append(_Gradients(block.kinds[i], weight1, weight2, need))
    # The gradient may be anyone's: what is accumulated into is memory of its own.
    grad, total = to_nhwc(grad), empty_nhwc(*saved.buffer.shape, like=saved.buffer)
    dx = empty_nhwc(n, saved.reads()[0], h, w, like=saved.buffer) if needs[0] else None
    native.module().dense_block_backward(
        _block(saved), layers, pointer(saved.mean), not block.keeps, [own.arguments() for own in gradients],
        grad.data_ptr(), pixel_stride(grad), total.data_ptr(), dmid.data_ptr(), pointer(dx),
    )  # fmt: skip
    return [dx, *(g for own in gradients for g in own.stage())]
