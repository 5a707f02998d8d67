"""LeNet-5 (LeCun, Bottou, Bengio & Haffner 1998), with the dense second convolution that everyone trains today."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn import AvgPool2d, MaxPool2d
from fastcnn.nn.sequential import fold_layers, run_layers

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}
POOLS = {"avg": AvgPool2d, "max": MaxPool2d}


class LeNet5(nn.Module):
    """Two convolutions, two poolings and three linear layers; keys conv1, conv2, fc1, fc2, fc3.

    Args:
        num_classes: outputs of the classifier.
        in_channels: of the images.
        image_size: 32, or 28, which the first convolution then pads by two pixels.
        activation: tanh, as in the paper, or relu.
        pool: avg, the paper's without its trainable coefficients, or max.

    Shapes: x [N, in_channels, image_size, image_size] in NCHW or NHWC memory; returns logits [N, num_classes]. Dtypes:
    float32, bfloat16, float16, float64; autocast is respected.
    Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition", section II.B; its sparse
    connections of the second convolution and its radial basis functions are left out.

    Raises:
        ValueError: an option that is none of those named here.
        TypeError, ValueError: an input that does not fit.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 32,
        activation: str = "tanh",
        pool: str = "avg",
    ) -> None:
        super().__init__()
        for name, value, known in (("activation", activation, ACTIVATIONS), ("pool", pool, POOLS)):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        if image_size not in (28, 32):
            raise ValueError(f"image_size: got {image_size!r}, expected 28 or 32")
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=(32 - image_size) // 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)
        self.activation, self.pool = ACTIVATIONS[activation](), POOLS[pool](2)

    def _features(self) -> tuple[nn.Module, ...]:
        return self.conv1, self.activation, self.pool, self.conv2, self.activation, self.pool

    def _classifier(self) -> tuple[nn.Module, ...]:
        return nn.Flatten(), self.fc1, self.activation, self.fc2, self.activation, self.fc3

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = run_layers(x, self._features())
        for layer in self._classifier():
            x = layer(x)
        return x

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize)."""
        features = fold_layers(self._features(), dtype)
        return (
            None if features is None else nn.Sequential(*features, *(layer.to(dtype) for layer in self._classifier()))
        )


@register(image_size=32, channels=1)
def lenet5(
    num_classes: int = 10,
    weights: str | os.PathLike[str] | None = None,
    in_channels: int = 1,
    image_size: int = 32,
    activation: str = "tanh",
    pool: str = "avg",
) -> LeNet5:
    """LeNet-5: 61,706 parameters and 0.42 M multiply-adds at 32 x 32.

    Args: as `LeNet5`. ``weights`` is a path or a URL of a .pth or .safetensors file with this model's keys.

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`), an unknown option.
        OSError: weights that cannot be read.
    """
    model = LeNet5(num_classes, in_channels, image_size, activation, pool)
    return model if weights is None else load_weights(model, weights)
