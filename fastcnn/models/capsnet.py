"""CapsNet (Sabour, Frosst & Hinton 2017, arXiv 1710.09829) with its decoder, after the authors' code."""

from __future__ import annotations

import os

import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn import CapsuleLinear, MarginLoss, PrimaryCaps
from fastcnn.nn.sequential import run_layers
from fastcnn.ops.layout import accumulation_dtype

KERNEL = 9
DIM, CLASS_DIM = 8, 16  # coordinates of a primary and of a class capsule
RECONSTRUCTION = 5e-4  # weight of the summed squared error of the pixels


def _same_padding(size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis that TensorFlow's SAME adds: the odd one comes after."""
    total = max(0, (-(-size // stride) - 1) * stride + KERNEL - size)
    return total // 2, total - total // 2


def _lengths(capsules: Tensor) -> Tensor:
    return capsules.to(accumulation_dtype(capsules)).norm(dim=-1)


def _truncated_normal(module: nn.Module, std: float) -> None:
    nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.constant_(module.bias, 0.1)


class CapsNet(nn.Module):
    """A convolution, primary capsules, routing to one capsule per class, and a decoder that draws the image again.

    Keys: ``conv1``, ``primary.conv``, ``digit.weight``, ``digit.bias``, ``decoder.{0,2,4}``.

    Args:
        num_classes: class capsules.
        in_channels, image_size: of the images, in pixels along an axis.
        types: primary capsules at each pixel.
        iterations: of routing.
        prime_scale: factor of the primary capsules' products: 1/32 as in the authors' code, whose primary capsules go
            through one step of routing; 1 as in the paper.
        bias: whether the class capsules have one, added in every iteration, as in the authors' code.
        leaky: one more logit of 0 in the routing's softmax.
        detach: whether backward takes the coupling coefficients as constants.
        same: zero padding, so that only the stride makes the image smaller, as TensorFlow's SAME.
        decoder: whether there is one, and with it a reconstruction in the training loss.

    Shapes: x [N, in_channels, image_size, image_size], with a decoder in [0, 1], in NCHW or NHWC memory; returns the
    lengths of the class capsules [N, num_classes], of which the longest is the answer. Dtypes: float32, bfloat16,
    float16, float64; autocast is respected.
    Initial values are the authors': normal distributions cut at two deviations, of 0.05 in the first convolution and
    else 0.1, and biases of 0.1.

    Raises:
        ValueError: images that are too small for two convolutions.
        TypeError, ValueError: an input that does not fit.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        types: int = 32,
        iterations: int = 3,
        prime_scale: float = 1 / 32,
        bias: bool = True,
        leaky: bool = False,
        detach: bool = False,
        same: bool = False,
        decoder: bool = True,
    ) -> None:
        super().__init__()
        after = image_size if same else image_size - KERNEL + 1
        grid = -(-after // 2) if same else (after - KERNEL) // 2 + 1
        if grid < 1:
            raise ValueError(f"image_size: got {image_size}, expected at least {2 * KERNEL - 1} pixels")
        self._padding = _same_padding(after, 2) if same else None
        self.image_shape = (in_channels, image_size, image_size)
        self.conv1 = nn.Conv2d(in_channels, 256, KERNEL, padding=KERNEL // 2 if same else 0)
        self.primary = PrimaryCaps(256, types, DIM, KERNEL, stride=2, scale=prime_scale)
        self.digit = CapsuleLinear(types * grid**2, DIM, num_classes, CLASS_DIM, iterations, bias, detach, leaky)
        self.decoder = self._make_decoder(num_classes) if decoder else None
        self._margin_loss = MarginLoss()
        self._relu = nn.ReLU()
        _truncated_normal(self.conv1, 0.05)
        _truncated_normal(self.primary.conv, 0.1)

    def _make_decoder(self, num_classes: int) -> nn.Sequential:
        channels, height, width = self.image_shape
        layers = nn.Sequential(
            nn.Linear(num_classes * CLASS_DIM, 512),
            nn.ReLU(inplace=True),
            nn.Linear(512, 1024),
            nn.ReLU(inplace=True),
            nn.Linear(1024, channels * height * width),
            nn.Sigmoid(),
        )
        for layer in layers[::2]:
            _truncated_normal(layer, 0.1)
        return layers

    def capsules(self, x: Tensor) -> Tensor:
        """The class capsules [N, num_classes, 16], shorter than 1."""
        x = run_layers(x, (self.conv1, self._relu))
        if self._padding:
            x = F.pad(x, self._padding * 2)
        return self.digit(self.primary(x))

    def forward(self, x: Tensor) -> Tensor:
        """The class capsules' lengths [N, num_classes]."""
        return _lengths(self.capsules(x))

    def reconstruct(self, capsules: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images in [0, 1], made from one class capsule of each.

        Args:
            capsules: [N, num_classes, 16].
            labels: whose capsules [N]; None: the longest ones.

        Shapes: the result [N, C, H, W].

        Raises:
            ValueError: the model has no decoder.
        """
        if self.decoder is None:
            raise ValueError("decoder: got False when the model was made, expected True to reconstruct")
        if labels is None:
            labels = _lengths(capsules).argmax(1)
        mask = F.one_hot(labels, capsules.shape[1]).unsqueeze(-1)
        return self.decoder((capsules * mask.to(capsules.dtype)).flatten(1)).view(-1, *self.image_shape)

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The margin loss plus 0.0005 times the summed squared error of the true class's reconstruction; lengths.

        Shapes: images as `forward`'s, labels [N] of class indices; the loss is a mean over images, a scalar.
        """
        capsules = self.capsules(images)
        loss = self._margin_loss(capsules, labels)
        if self.decoder is not None:
            error = self.reconstruct(capsules, labels).to(loss.dtype) - images
            loss = loss + RECONSTRUCTION * error.square().sum((1, 2, 3)).mean()
        return loss, _lengths(capsules.detach())


@register(image_size=28, channels=1, normalised=False)
def capsnet(
    num_classes: int = 10, weights: str | os.PathLike[str] | None = None, image_size: int = 28, **options: object
) -> CapsNet:
    """CapsNet for MNIST: 8,215,728 parameters, 1,411,344 of them the decoder's, and 0.202 G multiply-adds at 28 x 28.

    Args: as `CapsNet`. ``weights`` is a path or a URL of a .pth or .safetensors file with this model's keys.

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`), images that are too small.
        OSError: weights that cannot be read.
        TypeError: an option that `CapsNet` lacks.
    """
    model = CapsNet(num_classes, image_size=image_size, **options)
    return model if weights is None else load_weights(model, weights)


@register(image_size=24)
def capsnet_cifar(
    num_classes: int = 10, weights: str | os.PathLike[str] | None = None, image_size: int = 24, **options: object
) -> CapsNet:
    """CapsNet for CIFAR-10, as the authors' code: 64 types of primary capsules, leaky routing, SAME padding, no decoder.

    22,476,448 parameters at 24 x 24, the size of crop that it is trained on. Arguments and errors: `capsnet`.
    """
    usual = {"in_channels": 3, "types": 64, "leaky": True, "same": True, "decoder": False, "prime_scale": 1 / 64}
    model = CapsNet(num_classes, image_size=image_size, **(usual | options))
    return model if weights is None else load_weights(model, weights)
