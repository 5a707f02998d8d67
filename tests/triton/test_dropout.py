"""Dropout: the masks bit for bit, values and gradients."""

from __future__ import annotations

import pytest
import torch

from fastcnn import triton as backend
from fastcnn.ops.dropout import CHANNEL, ELEMENT, SAMPLE, kept, mask_of
from tests.ops.cases import affine, on_grid
from tests.triton.compare import DTYPES, check, on

SEED = torch.tensor([-0x123456789ABCDEF, 0x7EDCBA9876543210])
UNITS = {"element": ELEMENT, "channel": CHANNEL, "sample": SAMPLE}
SHAPES = (
    (1,),
    (31,),
    (3, 5),
    (64, 33),
    (2, 3, 1, 1),
    (2, 7, 5, 3),
    (3, 36, 4, 5),
    (2, 64, 7, 7),
    (2, 300, 9, 1),
    (5000,),
)


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_bit_for_bit(shape, p, unit, device):
    if unit == CHANNEL and len(shape) < 2:
        pytest.skip("one dimension has no channels")
    x = torch.ones(shape)
    for own in [x, x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else [x]:
        mask = mask_of(own, None, unit)
        placed, seed = on(device, (own, SEED))
        out = backend.dropout_fwd(placed, None, 0, None, p, 3.0, unit, seed).cpu()
        expected = kept(mask, p, SEED).expand(mask.rows, mask.channels).float() * 3
        assert torch.equal(out.as_strided(expected.shape, (mask.channels, 1)), expected)
        written = placed.clone()
        backend.dropout_inplace(written, p, 3.0, unit, seed)
        assert torch.equal(written.cpu(), out)


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", range(5))
@pytest.mark.parametrize("shape", [(3, 33, 4, 5), (2, 64, 7, 7), (9, 130)], ids=str)
def test_fused(shape, act, dtype, unit, device):
    x, grad = on_grid(*shape, dtype=dtype), on_grid(*shape, dtype=dtype)
    bias = affine(shape[1])[1]
    how = (0.3, 1 / 0.7, unit, SEED)
    check("dropout_fwd", (x, bias, act, grad, *how), device)
    check("dropout_fwd", (x, None, act, None, *how), device)
    check("dropout_bwd", (grad, x if act else None, bias, act, *how, True), device)
    check("dropout_bwd", (grad, x if act else None, None, act, *how, False), device)


def test_sums_of_many_tiles(device):
    check("dropout_bwd", (on_grid(3000, 24), None, torch.zeros(24), 0, 0.5, 2.0, ELEMENT, SEED, True), device)


@pytest.mark.gpu
def test_graphs_draw_anew_and_repeat_with_torchs_seed(gpu):
    from fastcnn import ops

    x = torch.ones(4096, device=gpu)
    torch.cuda.manual_seed(1)
    ops.dropout(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.dropout(x)
    replays = []
    for seed in (5, None, 5):
        if seed is not None:
            torch.cuda.manual_seed(seed)
        graph.replay()
        replays.append(out.clone())
    assert not torch.equal(replays[0], replays[1])
    assert torch.equal(replays[0], replays[2])
