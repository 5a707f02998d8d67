"""LeNet-5 and CapsNet in plain torch, written after their papers: no package has them to compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainLeNet5(nn.Module):
    """LeCun et al. 1998, with a dense second convolution; keys as `fastcnn.models.LeNet5`."""

    def __init__(
        self, size: int = 32, act: Callable = torch.tanh, pool: Callable[[Tensor, int], Tensor] = F.avg_pool2d
    ) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=(32 - size) // 2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)
        self.act, self.pool = act, pool

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 10]."""
        x = self.pool(self.act(self.conv1(x)), 2)
        x = self.pool(self.act(self.conv2(x)), 2).flatten(1)
        return self.fc3(self.act(self.fc2(self.act(self.fc1(x)))))


def plain_squash(s: Tensor) -> Tensor:
    """Equation 1 of the paper, along the last dimension."""
    square = s.square().sum(-1, keepdim=True)
    return square / (1 + square) * s / square.sqrt()


class _Primary(nn.Module):
    def __init__(self, types: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(256, 8 * types, 9, 2)


class _Digit(nn.Module):
    def __init__(self, in_caps: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_caps, 10, 8, 16) / 10)
        self.bias = nn.Parameter(torch.full((10, 16), 0.1)) if bias else None


class PlainCapsNet(nn.Module):
    """Sabour, Frosst & Hinton 2017, with the options of their code; keys as `fastcnn.models.CapsNet`.

    Padded as TensorFlow's SAME it has no decoder and a leaky routing, as theirs for CIFAR.
    """

    def __init__(
        self, size: int = 28, channels: int = 1, types: int = 32, prime_scale: float = 1 / 32, bias: bool = True,
        same: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.prime_scale, self.same, self.types = prime_scale, same, types
        self.conv1 = nn.Conv2d(channels, 256, 9)
        self.primary = _Primary(types)
        grid = size // 2 if same else (size - 8 - 9) // 2 + 1
        self.digit = _Digit(types * grid**2, bias)
        pixels = channels * size**2
        if not same:
            self.decoder = nn.Sequential(
                nn.Linear(160, 512), nn.ReLU(), nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, pixels), nn.Sigmoid()
            )

    def capsules(self, x: Tensor) -> Tensor:
        """The class capsules [N, 10, 16]."""
        if self.same:
            x = F.pad(x, (4, 4, 4, 4))
        x = F.relu(self.conv1(x))
        if self.same:
            x = F.pad(x, (3, 4, 3, 4))  # one zero more after than before: 9 taps, stride 2, an even size
        s = F.conv2d(x, self.primary.conv.weight, None, 2) * self.prime_scale + self.primary.conv.bias.view(-1, 1, 1)
        u = plain_squash(s.unflatten(1, (self.types, 8)).permute(0, 1, 3, 4, 2).flatten(1, 3))
        votes = torch.einsum("bid,iode->bioe", u, self.digit.weight)
        logits = torch.zeros_like(votes[..., 0])
        for _ in range(3):
            c = F.pad(logits, (1, 0)).softmax(-1)[..., 1:] if self.same else logits.softmax(-1)  # leaky
            s = (c.unsqueeze(-1) * votes).sum(1)
            v = plain_squash(s if self.digit.bias is None else s + self.digit.bias)
            logits = logits + (votes * v.unsqueeze(1)).sum(-1)
        return v

    def forward(self, x: Tensor) -> Tensor:
        """Their lengths [N, 10]."""
        return self.capsules(x).norm(dim=-1)

    def training_loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Margin loss and 0.0005 times the summed squared error of the reconstruction; lengths."""
        v = self.capsules(x)
        lengths, true = v.norm(dim=-1), F.one_hot(labels, 10)
        loss = true * F.relu(0.9 - lengths) ** 2 + 0.5 * (1 - true) * F.relu(lengths - 0.1) ** 2
        loss = loss.sum(1)
        if not self.same:
            made = self.decoder((v * true.unsqueeze(-1)).flatten(1))
            loss = loss + 0.0005 * (made - x.flatten(1)).square().sum(1)
        return loss.mean(), lengths
