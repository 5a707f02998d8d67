"""The residual networks' blocks: which chains run, shortcuts of every kind, dropout, what they refuse."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torchvision
from torch import nn

import fastcnn
from fastcnn import backends
from fastcnn.nn import BasicBlock, Bottleneck, ConvBNAct, FusedSequential, MaxPool2d, PreActBlock, SyncBatchNorm2d
from fastcnn.nn.sequential import segments
from tests.nn.pairs import basic, bottleneck, downsample, pre_act, randomise
from tests.tolerances import assert_close


def primitives(module: nn.Module, x: torch.Tensor, backward: bool = False) -> Counter[str]:
    """How often a forward (and backward) calls each primitive."""
    found: Counter[str] = Counter()

    def observer(name, args, backend, function):
        found[name] += 1
        return function(*args)

    with backends.observe(observer):
        y = module(x)
        if backward:
            y.sum().backward()
    return found


def test_a_training_step_makes_one_pass_besides_the_convolutions():
    """What torch makes of it: a pass for every BatchNorm, activation and sum."""
    block, x = bottleneck()[0], torch.randn(2, 16, 6, 5)
    assert primitives(block, x) == {"pointwise_fwd": 2, "conv2d_fwd": 1, "affine_act_fwd": 1}
    backward = primitives(block, x, backward=True) - primitives(block, x)
    # The output, whose signs are the mask, is made again; the next block's backward asks for it too.
    assert backward == {"pointwise_bwd": 2, "conv2d_bwd": 1, "residual_act_bwd": 1, "affine_act_fwd": 1}


def test_an_eval_pass_is_its_convolutions():
    x = torch.randn(2, 16, 6, 5)
    with torch.no_grad():
        assert primitives(bottleneck()[0].eval(), x) == {"pointwise_fwd": 2, "conv2d_fwd": 1}
        assert primitives(basic(2, 24)[0].eval(), x) == {"conv2d_fwd": 2, "pointwise_fwd": 1}
        assert primitives(pre_act()[0].eval(), x) == {"conv2d_fwd": 2}
        folded = fastcnn.optimize(pre_act(2, 24)[0])
        assert primitives(folded, x) == {"conv2d_fwd": 2, "pointwise_fwd": 1}


def test_a_projected_pre_activation_is_made_once():
    block, x = pre_act(2, 24)[0], torch.randn(2, 16, 6, 5)
    assert primitives(block, x)["channel_statistics"] == 1
    assert primitives(block, x)["affine_act_fwd"] == 1  # the pre-activation; the sum is stored by the last convolution


class _Halved(nn.Module):
    """A shortcut that has no fused form."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


SHORTCUTS = {
    "fused layer": lambda: ConvBNAct(16, 16, 1, activation_layer=None),
    "sequential with more": lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), *downsample(16, 16, 1)),
    "no parameters": lambda: nn.AvgPool2d(3, 1, 1),
    "foreign": _Halved,
}


@pytest.mark.parametrize("kind", SHORTCUTS)
def test_any_module_is_a_shortcut(kind):
    stock = torchvision.models.resnet.BasicBlock(16, 16, 1, SHORTCUTS[kind]())
    ours = BasicBlock(16, 16, 1, SHORTCUTS[kind]())
    ours.load_state_dict(randomise(stock).state_dict())
    x = torch.randn(3, 16, 7, 6)
    assert_close(ours(x), stock(x), torch.float32)
    ours.eval(), stock.eval()
    with torch.no_grad():
        assert_close(ours(x), stock(x), torch.float32)
        for dtype in (torch.float32, torch.bfloat16):
            assert_close(fastcnn.optimize(ours, dtype)(x), stock(x), dtype)


def test_statistics_that_are_not_kept_cannot_be_folded():
    def norm(channels: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(channels, track_running_stats=False)

    x = torch.randn(3, 16, 7, 6)
    for block in (BasicBlock(16, 16, norm_layer=norm), PreActBlock(16, 16, normalization=norm)):
        assert block.folded(None) is None
        assert_close(fastcnn.optimize(block)(x), block.eval()(x), torch.float32)


def test_synchronised_norms_stay_in_the_chain():
    block, x = bottleneck()[0], torch.randn(2, 16, 6, 5)
    layers = FusedSequential(nn.Conv2d(16, 8, 1), SyncBatchNorm2d(8), nn.ReLU())
    assert len(segments(layers)) == 1
    expected = block(x)
    assert_close(fastcnn.nn.convert_sync_batchnorm(block)(x), expected, torch.float32)


def test_dropout_in_training_only():
    block, x = PreActBlock(16, 16, dropout=0.5), torch.randn(4, 16, 8, 8)
    plain = PreActBlock(16, 16)
    plain.load_state_dict(block.state_dict())
    assert not torch.equal(block(x), plain(x))
    y = block(x)
    y.square().sum().backward()
    assert all(p.grad.norm() > 0 for p in block.parameters())
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BasicBlock(8, 8, groups=2), ValueError, "groups: got 2, expected 1"),
        (lambda: BasicBlock(8, 8, base_width=32), ValueError, "base_width: got 32, expected 64"),
        (lambda: BasicBlock(8, 8, dilation=2), ValueError, "dilation: got 2, expected 1"),
        (lambda: PreActBlock(8, 8, 0), ValueError, "stride: got 0, expected an integer of at least 1"),
        (lambda: PreActBlock(8, 8, dropout=1.0), ValueError, "dropout: got 1.0, expected a probability below 1"),
        (
            lambda: ConvBNAct(8, 8, order="act"),
            ValueError,
            "order: got 'act', expected one of conv_bn_act, bn_act_conv",
        ),
        (lambda: ConvBNAct(8, 8, activation_layer=nn.GELU), TypeError, "activation: got GELU, expected one of ReLU"),
        (
            lambda: Bottleneck(8, 2, norm_layer=lambda n: nn.GroupNorm(1, n))(torch.randn(1, 8, 4, 4)),
            TypeError,
            "norm: got GroupNorm, expected nn.BatchNorm2d",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_sequential_is_cut_where_it_cannot_be_fused():
    layers = FusedSequential(
        nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8),
        nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.ReLU(),
    )  # fmt: skip
    lengths = [len(s) if isinstance(s, list) else type(s).__name__ for s in segments(layers)]
    assert lengths == [2, 2, 1, "MaxPool2d", "Conv2d", 1, 1]
    plain = randomise(nn.Sequential(*layers))
    x = torch.randn(2, 8, 9, 9)
    assert_close(layers(x), plain.double()(x.double()), torch.float32)
    assert isinstance(layers.float()[1:3], FusedSequential)
    assert list(layers.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": 2}, {"dilation": 2}, {"ceil_mode": True}])
def test_max_pooling_is_torchs(options):
    x = torch.randn(2, 5, 9, 8)
    ours, plain = MaxPool2d(3, **options), nn.MaxPool2d(3, **options)
    assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours(x[0]), plain(x[0]))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours(a).square().sum().backward(), plain(b).square().sum().backward()
    assert torch.equal(a.grad, b.grad)
