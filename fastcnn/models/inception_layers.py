"""What the Inception networks share: convolutions by their sizes, torchvision's input transform, initialisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcnn.nn import AvgPool2d, BasicConv2d

Pair = tuple[int, int]

# torchvision's: from ImageNet's mean and deviation to 0.5 and 0.5, which TensorFlow's weights expect.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Pair = 1,
    stride: int = 1,
    padding: int | Pair | None = None,
    batch_norm: bool = True,
) -> BasicConv2d:
    """A `BasicConv2d`; padding None keeps the size at stride 1 and is none at another."""
    if padding is None:
        r, s = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        padding = (r // 2, s // 2) if stride == 1 else 0
    return BasicConv2d(in_channels, out_channels, kernel_size, stride, padding, batch_norm)


def chain(channels: int, *convs: tuple, batch_norm: bool = True) -> nn.Sequential:
    """One `conv` after another over so many channels, each (out_channels, kernel_size, stride, padding) or its start."""
    inputs = (channels, *(spec[0] for spec in convs))
    return nn.Sequential(*(conv(c, *spec, batch_norm=batch_norm) for c, spec in zip(inputs, convs)))


def average(in_channels: int, out_channels: int) -> nn.Sequential:
    """Average pooling over the pixels of the image, none of the padding's, then a 1x1 convolution, as TensorFlow's."""
    return nn.Sequential(AvgPool2d(3, 1, 1, count_include_pad=False), conv(in_channels, out_channels))


class InputTransform(nn.Module):
    """Images normalised to ImageNet's mean and deviation as ones normalised to 0.5 and 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to the same."""
        channels = x.split(1, 1)
        scaled = (c * (d / 0.5) + (m - 0.5) / 0.5 for c, m, d in zip(channels, MEAN, DEVIATION))
        return torch.cat(tuple(scaled), 1)


def truncated_normal(module: nn.Module, deviations: dict[nn.Module, float], usual: float) -> None:
    """Draws the weights of every convolution and linear layer as torchvision does, in the order of its modules.

    ``deviations`` has the standard deviations that are not the usual one.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(layer.weight, std=deviations.get(layer, usual), a=-2, b=2)
