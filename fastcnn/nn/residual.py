"""The residual networks' blocks, each one or two fused chains: ResNet's, ResNeXt's, WideResNet's."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastcnn.nn.folded import FoldedResidual
from fastcnn.nn.fused import FusedModule, Unit, convolutions, is_foldable, run_units
from fastcnn.nn.sequential import fold_module, fold_units, run_layers
from fastcnn.ops import dropout
from fastcnn.ops.validation import pair

Pair = tuple[int, int]
NormLayer = Callable[[int], nn.BatchNorm2d]


def _shortened(x: Tensor, shortcut: nn.Module | None) -> Tensor:
    """What the shortcut adds; a plain nn.Sequential of convolution and BatchNorm runs as one chain."""
    if shortcut is None:
        return x
    return run_layers(x, shortcut) if type(shortcut) is nn.Sequential else shortcut(x)


class ResidualBlock(FusedModule):
    """A chain of convolutions, plus the input or what a shortcut makes of it, then the last activation.

    Subclasses give the chain (`units`) and the shortcut. The sum and its activation are the chain's last store.
    """

    act_after_residual = True

    @abstractmethod
    def shortcut(self) -> nn.Module | None:
        """The module from the input to the shape of the chain's output; None: the identity."""

    def forward(self, x: Tensor) -> Tensor:
        """The block's output [N, C, P, Q], channels_last.

        Raises:
            TypeError, ValueError: an input that does not fit the block.
        """
        return run_units(x, self.units(), "none", _shortened(x, self.shortcut()), self.act_after_residual)

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), or None where a part has none."""
        units, shortcut = self.units(), self.shortcut()
        folded = None if shortcut is None else fold_module(shortcut, dtype)
        if not is_foldable(units) or (shortcut is not None and folded is None):
            return None
        return FoldedResidual(convolutions(units, True), "none", dtype, self.act_after_residual, folded)

    def extra_repr(self) -> str:
        """What is fused."""
        shortcut = self.shortcut()
        name = "identity" if shortcut is None else type(shortcut).__name__
        return f"fused: {len(self.units())} convolutions, shortcut={name}"


def _conv3x3(inplanes: int, planes: int, stride: int | Pair = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions with BatchNorm, ReLU after the first and after the sum; ResNet-18's and -34's block.

    Keys and arguments: torchvision's BasicBlock (``conv1``, ``bn1``, ``conv2``, ``bn2``, ``downsample``). The layers hold
    the state; they are not called, so hooks on them do not fire.

    Args:
        inplanes, planes: channels in and out.
        stride: of the first convolution.
        downsample: from the input to the output's shape, where those differ: nn.Sequential(conv, bn), which runs as one
            chain, or any module; None: the identity.
        groups, base_width, dilation: 1, 64, 1: torchvision's block takes no others.
        norm_layer: makes an nn.BatchNorm2d of a number of channels.

    Shapes: x [N, inplanes, H, W] in NCHW or NHWC memory; the result [N, planes, P, Q] is channels_last.
    Source: ResNet (arXiv 1512.03385, figure 5, left).

    Raises:
        ValueError: other groups, base_width or dilation.
        TypeError: a norm_layer that makes no nn.BatchNorm2d (at the first call).
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        for name, value, expected in (("groups", groups, 1), ("base_width", base_width, 64), ("dilation", dilation, 1)):
            if value != expected:
                raise ValueError(f"{name}: got {value}, expected {expected}, the only one that a BasicBlock has")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def units(self) -> list[Unit]:
        """The two convolutions."""
        return [Unit((self.conv1,), self.bn1, "relu"), Unit((self.conv2,), self.bn2, "relu")]

    def shortcut(self) -> nn.Module | None:
        """``downsample``."""
        return self.downsample


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolution with BatchNorm, ReLU after each and, at the end, after the sum; ResNet-50's block.

    With groups it is ResNeXt's, with a base_width of 128 WideResNet-50-2's. The stride is the 3x3 convolution's, as in
    torchvision; the paper's is the first's. Keys and arguments: torchvision's Bottleneck (``conv1``, ``bn1``, ...,
    ``downsample``). The layers hold the state; they are not called, so hooks on them do not fire.

    Args:
        inplanes: channels in.
        planes: channels out, over 4.
        stride: of the 3x3 convolution.
        downsample: from the input to the output's shape, where those differ: nn.Sequential(conv, bn), which runs as one
            chain, or any module; None: the identity.
        groups, base_width: the 3x3 convolution has int(planes * base_width / 64) * groups channels in that many groups.
        dilation: of the 3x3 convolution.
        norm_layer: makes an nn.BatchNorm2d of a number of channels.

    Shapes: x [N, inplanes, H, W] in NCHW or NHWC memory; the result [N, 4 * planes, P, Q] is channels_last.
    Source: ResNet (arXiv 1512.03385, figure 5, right), ResNeXt (arXiv 1611.05431, figure 3c).

    Raises:
        TypeError: a norm_layer that makes no nn.BatchNorm2d (at the first call).
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * self.expansion)
        self.downsample = downsample
        self.stride = stride

    def units(self) -> list[Unit]:
        """The three convolutions."""
        pairs = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        return [Unit((conv,), norm, "relu") for conv, norm in pairs]

    def shortcut(self) -> nn.Module | None:
        """``downsample``."""
        return self.downsample


def _pre_conv(in_channels: int, out_channels: int, stride: int | Pair, bias: bool, norm: NormLayer) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=bias)
    return nn.Sequential(OrderedDict(bn=norm(in_channels), activ=nn.ReLU(inplace=True), conv=conv))


class PreActBlock(FusedModule):
    """BatchNorm, ReLU, 3x3 convolution, twice, plus the input: WideResNet's block.

    Where the shape changes, the shortcut is a 1x1 convolution of the pre-activated input, which is then made once for
    both; else the pre-activation exists in registers only. Keys: those of pytorchcv's PreResUnit with
    ``bottleneck=False`` (``body.conv1.bn``, ``body.conv1.conv``, ``body.conv2.*``, ``identity_conv``); its argument names.
    ``body`` holds the state; it is not called, so hooks inside it do not fire.

    Args:
        in_channels, out_channels: channels in and out.
        stride: of the first convolution.
        bias: whether the convolutions have one.
        normalization: makes an nn.BatchNorm2d of a number of channels.
        dropout: probability of zeroing a value before the second convolution, in training (WideResNet: 0.3).

    Shapes: x [N, in_channels, H, W] in NCHW or NHWC memory; the result [N, out_channels, P, Q] is channels_last.
    Source: pre-activation (arXiv 1603.05027, figure 4e), WideResNet (arXiv 1605.07146, figure 1).

    Raises:
        ValueError: a stride below 1, a dropout that is no probability.
        TypeError: a normalization that makes no nn.BatchNorm2d (at the first call).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | Pair = 1,
        bias: bool = False,
        normalization: NormLayer = nn.BatchNorm2d,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}, expected a probability below 1")
        self.body = nn.Sequential(
            OrderedDict(
                conv1=_pre_conv(in_channels, out_channels, stride, bias, normalization),
                conv2=_pre_conv(out_channels, out_channels, 1, bias, normalization),
            )
        )
        self.dropout = dropout
        self.resize_identity = in_channels != out_channels or pair(stride, "stride", 1) != (1, 1)
        if self.resize_identity:
            self.identity_conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias)

    def units(self) -> list[Unit]:
        """The pre-activation and the two convolutions."""
        first, second = self.body
        return [Unit((), first.bn, "relu"), Unit((first.conv,), second.bn, "relu"), Unit((second.conv,))]

    def forward(self, x: Tensor) -> Tensor:
        """The block's output [N, out_channels, P, Q], channels_last.

        Raises:
            TypeError, ValueError: an input that does not fit the block.
        """
        pre, *units = self.units()
        residual = x
        if self.resize_identity:
            x = run_units(x, [pre])
            residual = run_units(x, [Unit((self.identity_conv,))])
        else:
            units = [pre, *units]
        if self.dropout and self.training:
            x = dropout(run_units(x, units[:-1]), self.dropout)
            units = units[-1:]
        return run_units(x, units, residual=residual)

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), or None where a BatchNorm keeps no running statistics."""
        units = self.units()
        if not is_foldable(units):
            return None
        shortcut = None
        if self.resize_identity:
            shortcut = fold_units([units[0], Unit((self.identity_conv,))], dtype)
        return FoldedResidual(convolutions(units, True), "none", dtype, shortcut=shortcut)

    def extra_repr(self) -> str:
        """What is fused."""
        shortcut = "projection" if self.resize_identity else "identity"
        return f"fused: pre-activation, 2 convolutions, shortcut={shortcut}, dropout={self.dropout}"
