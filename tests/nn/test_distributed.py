"""Several processes that share a batch compute what one process with the whole batch does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastcnn.nn import (
    BasicConv2d,
    Bottleneck,
    Branches,
    ConvBNAct,
    DenseBlock,
    PreActBlock,
    SeparableConv2d,
    SyncBatchNorm2d,
    Transition,
    convert_sync_batchnorm,
)
from tests.tolerances import assert_close

SPLITS = ((2, 2), (1, 3))  # images of each process


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        ConvBNAct(3, 20, 3, 2),
        SeparableConv2d(
            20, 24, 3, padding=1, mid_norm=nn.BatchNorm2d, mid_act="relu", out_norm=nn.BatchNorm2d, out_act="relu"
        ),
        Bottleneck(24, 6),
        Branches(a=BasicConv2d(24, 12, 1), b=nn.Sequential(BasicConv2d(24, 6, 1), BasicConv2d(6, 12, 3, padding=1))),
        DenseBlock(2, 24, 2, 5),
        ConvBNAct(34, 17, 1),
        PreActBlock(17, 17, 1),
        ConvBNAct(17, 8, 3, order="bn_act_conv"),
        Transition(8, 6),
    )
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return model


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 15, 14, generator=generator), torch.randn(4, 6, 4, 3, generator=generator)


def _results(model: nn.Module, y: torch.Tensor) -> dict[str, torch.Tensor]:
    gradients = {f"gradient of {k}": p.grad for k, p in model.named_parameters()}
    return {"output": y.detach(), **gradients, **{k: b.clone() for k, b in model.named_buffers()}}


def _process(rank: int, split: tuple[int, ...], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=len(split))
    try:
        model = DistributedDataParallel(convert_sync_batchnorm(_model()))
        first = sum(split[:rank])
        x, target = (t[first : first + split[rank]] for t in _batch())
        y = model(x)
        # DDP averages gradients over processes; this loss makes the average the gradient of the whole batch's sum.
        (len(split) * (y * target).sum()).backward()
        torch.save(_results(model.module, y), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("split", SPLITS)
def test_two_processes_equal_one_with_the_whole_batch(split, tmp_path):
    mp.start_processes(_process, (split, str(tmp_path)), nprocs=len(split), start_method="spawn")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(split))]
    model = copy.deepcopy(_model()).double()
    x, target = (t.double() for t in _batch())
    y = model(x)
    (y * target).sum().backward()
    expected = _results(model, y)
    assert_close(torch.cat([part.pop("output") for part in parts]), expected.pop("output"), torch.float32)
    for rank, part in enumerate(parts):
        for name, value in expected.items():
            assert_close(part[name], value, torch.float32, f"process {rank}: {name}")
    for name in expected:
        assert torch.equal(parts[0][name], parts[1][name]), f"{name} differs between the processes"


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_one_process_is_a_batch_norm(convert):
    model, (x, _) = _model(), _batch()
    synced = convert(copy.deepcopy(model))
    assert synced.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(synced(x), model(x))


def test_alone_it_is_torchs():
    ours, torchs, x = SyncBatchNorm2d(3), nn.BatchNorm2d(3), _batch()[0]
    assert_close(ours(x), torchs(x), torch.float32)
    assert_close(ours.running_var, torchs.running_var, torch.float32)
