"""Inception-ResNet-v1 and -v2 (Szegedy et al. 2016, arXiv 1602.07261), as facenet-pytorch and timm build them."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.models.inception_layers import average, chain, conv
from fastcnn.models.registry import register
from fastcnn.models.weights import load_weights
from fastcnn.nn import Branches, Dropout, MaxPool2d
from fastcnn.nn.branches import concat_branches
from fastcnn.nn.folded import FoldedChain, FoldedClassifier
from fastcnn.nn.folded_branches import FoldedBranches, fold_branches
from fastcnn.nn.sequential import fold_layers, run_layers
from fastcnn.ops import BatchNorm, Conv, conv_chain

Source = str | os.PathLike[str] | None

WIDE, TALL = (1, 7), (7, 1)


class FoldedResidualInception(nn.Module):
    """The inference form of a ResidualInception."""

    def __init__(self, branches: FoldedBranches, projection: FoldedChain) -> None:
        super().__init__()
        self.branches, self.projection = branches, projection

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; the projection adds x as it stores."""
        return self.projection(self.branches(x), x)


class ResidualInception(nn.Module):
    """act(x + scale * conv2d(the branches' concatenation)); keys ``branch0``, ``branch1``, ..., ``conv2d``.

    ``conv2d`` is 1x1 with a bias and without BatchNorm. Its weight and bias are scaled instead of its output, so that the
    sum and the activation are its only store.

    Args:
        channels: of x and of the result.
        merged: channels of the concatenation.
        scale: of what is added to x.
        branches: each a layer or a plain nn.Sequential.
        act: "relu" or "none".

    Shapes: x [N, channels, H, W] in any memory format; the result is channels_last.
    Source: section 3.3 of the paper, figures 10 to 19.

    Raises:
        TypeError, ValueError: an input that does not fit the block.
    """

    def __init__(self, channels: int, merged: int, scale: float, *branches: nn.Module, act: str = "relu") -> None:
        super().__init__()
        for i, branch in enumerate(branches):
            self.add_module(f"branch{i}", branch)
        self.conv2d = nn.Conv2d(merged, channels, 1)
        self.scale, self.act = scale, act

    def _branches(self) -> list[nn.Module]:
        return [child for name, child in self.named_children() if name.startswith("branch")]

    def _projection(self) -> Conv:
        weight, bias = self.conv2d.weight, self.conv2d.bias
        if self.scale != 1.0:
            weight, bias = weight * self.scale, bias * self.scale
        return Conv("pointwise", (weight,), act=self.act, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output [N, channels, H, W]."""
        y = concat_branches(x, self._branches())
        return conv_chain(y, [self._projection()], residual=x, act_after_residual=True)

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize), or None where a branch has none."""
        branches = fold_branches(self._branches(), dtype)
        if branches is None:
            return None
        projection = FoldedChain([self._projection()], dtype=dtype, act_after_residual=True)
        return FoldedResidualInception(branches, projection)

    def extra_repr(self) -> str:
        """The scale and the activation."""
        return f"scale={self.scale:g}, act={self.act}"


def _reduction_a(channels: int, reduced: int, middle: int, last: int) -> Branches:
    """To half the size (figure 7)."""
    second = chain(channels, (reduced,), (middle, 3), (last, 3, 2))
    return Branches(branch0=conv(channels, 384, 3, 2), branch1=second, branch2=MaxPool2d(3, 2))


def _reduction_b(channels: int, second: int, middle: int, last: int) -> Branches:
    """To half the size (figures 13 and 18)."""
    return Branches(
        branch0=chain(channels, (256,), (384, 3, 2)),
        branch1=chain(channels, (256,), (second, 3, 2)),
        branch2=chain(channels, (256,), (middle, 3), (last, 3, 2)),
        branch3=MaxPool2d(3, 2),
    )


class InceptionResNetV1(nn.Module):
    """Inception-ResNet-v1 with facenet-pytorch's state_dict keys; every branch is a fused chain.

    Args:
        num_classes: outputs of the classifier.
        dropout: probability of zeroing a feature before the head, in training; None: 0.6, facenet's, or the paper's 0.2.
        embedding: features of facenet's head, a linear layer (``last_linear``) with BatchNorm (``last_bn``) before the
            classifier (``logits``); None: the classifier alone.
        paper: the paper's network, without that head and without TensorFlow's last residual block, which has neither scale
            nor activation.

    Shapes: x [N, 3, H, W], RGB normalised to mean 0.5 and deviation 0.5, of at least 75 x 75 pixels in NCHW or NHWC memory
    (299 x 299 in the paper, 160 x 160 for facenet's weights); returns logits [N, num_classes]. Dtypes: float32, bfloat16,
    float16, float64; autocast is respected.

    Raises:
        TypeError, ValueError: an input that is no [N, 3, H, W] float tensor, or below 75 pixels.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float | None = None,
        embedding: int | None = 512,
        paper: bool = False,
    ) -> None:
        super().__init__()
        embedding = None if paper else embedding
        self.conv2d_1a = conv(3, 32, 3, 2)
        self.conv2d_2a = conv(32, 32, 3, padding=0)
        self.conv2d_2b = conv(32, 64, 3)
        self.maxpool_3a = MaxPool2d(3, 2)
        self.conv2d_3b = conv(64, 80)
        self.conv2d_4a = conv(80, 192, 3, padding=0)
        self.conv2d_4b = conv(192, 256, 3, 2)
        self.repeat_1 = nn.Sequential(*(self._block35() for _ in range(5)))
        self.mixed_6a = _reduction_a(256, 192, 192, 256)
        self.repeat_2 = nn.Sequential(*(self._block17() for _ in range(10)))
        self.mixed_7a = _reduction_b(896, 256, 256, 256)
        self.repeat_3 = nn.Sequential(*(self._block8() for _ in range(5)))
        self.block8 = None if paper else self._block8(1.0, "none")
        self.dropout = Dropout((0.2 if paper else 0.6) if dropout is None else dropout)
        self.last_linear = self.last_bn = None
        if embedding is not None:
            self.last_linear = nn.Linear(1792, embedding, bias=False)
            self.last_bn = nn.BatchNorm1d(embedding, eps=1e-3)
        self.logits = nn.Linear(embedding or 1792, num_classes)

    @staticmethod
    def _block35() -> ResidualInception:
        branches = conv(256, 32), chain(256, (32,), (32, 3)), chain(256, (32,), (32, 3), (32, 3))
        return ResidualInception(256, 96, 0.17, *branches)

    @staticmethod
    def _block17() -> ResidualInception:
        return ResidualInception(896, 256, 0.1, conv(896, 128), chain(896, (128,), (128, WIDE), (128, TALL)))

    @staticmethod
    def _block8(scale: float = 0.2, act: str = "relu") -> ResidualInception:
        branches = conv(1792, 192), chain(1792, (192,), (192, (1, 3)), (192, (3, 1)))
        return ResidualInception(1792, 384, scale, *branches, act=act)

    def _layers(self) -> list[nn.Module]:
        stem = [self.conv2d_1a, self.conv2d_2a, self.conv2d_2b, self.maxpool_3a]
        stem += [self.conv2d_3b, self.conv2d_4a, self.conv2d_4b]
        blocks = [*self.repeat_1, self.mixed_6a, *self.repeat_2, self.mixed_7a, *self.repeat_3]
        return [*stem, *blocks, *([] if self.block8 is None else [self.block8])]

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = self.dropout(F.adaptive_avg_pool2d(run_layers(x, self._layers()), 1).flatten(1))
        return self.logits(x if self.last_linear is None else self.last_bn(self.last_linear(x)))

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize)."""
        features = fold_layers(self._layers(), dtype)
        norm = self.last_bn
        if features is None or (norm is not None and norm.running_mean is None):
            return None
        head = FoldedClassifier(self.logits, dtype)
        if norm is not None:
            frozen = BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.0, norm.eps)
            embed = Conv("pointwise", (self.last_linear.weight[:, :, None, None],), norm=frozen)
            # The classifier's own pooling of one pixel is that pixel.
            head = nn.Sequential(nn.AdaptiveAvgPool2d(1), FoldedChain([embed], dtype=dtype), head)
        return nn.Sequential(*features, head)


class InceptionResNetV2(nn.Module):
    """Inception-ResNet-v2 with timm's state_dict keys, which is TensorFlow's network.

    It differs from the paper's in its stem, Inception-v3's with one block behind it, in twice the residual blocks, and in a
    last block without scale and activation. Every branch is a fused chain.

    Args:
        num_classes: outputs of the classifier.
        dropout: probability of zeroing a feature before the classifier, in training (the paper: 0.2).

    Shapes: x [N, 3, H, W], RGB normalised to mean 0.5 and deviation 0.5, of at least 75 x 75 pixels in NCHW or NHWC memory
    (299 x 299 in the paper); returns logits [N, num_classes]. Dtypes: float32, bfloat16, float16, float64; autocast is
    respected.

    Raises:
        TypeError, ValueError: an input that is no [N, 3, H, W] float tensor, or below 75 pixels.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv2d_1a = conv(3, 32, 3, 2)
        self.conv2d_2a = conv(32, 32, 3, padding=0)
        self.conv2d_2b = conv(32, 64, 3)
        self.maxpool_3a = MaxPool2d(3, 2)
        self.conv2d_3b = conv(64, 80)
        self.conv2d_4a = conv(80, 192, 3, padding=0)
        self.maxpool_5a = MaxPool2d(3, 2)
        self.mixed_5b = Branches(
            branch0=conv(192, 96),
            branch1=chain(192, (48,), (64, 5)),
            branch2=chain(192, (64,), (96, 3), (96, 3)),
            branch3=average(192, 64),
        )
        self.repeat = nn.Sequential(*(self._block35() for _ in range(10)))
        self.mixed_6a = _reduction_a(320, 256, 256, 384)
        self.repeat_1 = nn.Sequential(*(self._block17() for _ in range(20)))
        self.mixed_7a = _reduction_b(1088, 288, 288, 320)
        self.repeat_2 = nn.Sequential(*(self._block8() for _ in range(9)))
        self.block8 = self._block8(1.0, "none")
        self.conv2d_7b = conv(2080, 1536)
        self.dropout = Dropout(dropout)
        self.classif = nn.Linear(1536, num_classes)

    @staticmethod
    def _block35() -> ResidualInception:
        branches = conv(320, 32), chain(320, (32,), (32, 3)), chain(320, (32,), (48, 3), (64, 3))
        return ResidualInception(320, 128, 0.17, *branches)

    @staticmethod
    def _block17() -> ResidualInception:
        return ResidualInception(1088, 384, 0.1, conv(1088, 192), chain(1088, (128,), (160, WIDE), (192, TALL)))

    @staticmethod
    def _block8(scale: float = 0.2, act: str = "relu") -> ResidualInception:
        branches = conv(2080, 192), chain(2080, (192,), (224, (1, 3)), (256, (3, 1)))
        return ResidualInception(2080, 448, scale, *branches, act=act)

    def _layers(self) -> list[nn.Module]:
        stem = [self.conv2d_1a, self.conv2d_2a, self.conv2d_2b, self.maxpool_3a]
        stem += [self.conv2d_3b, self.conv2d_4a, self.maxpool_5a, self.mixed_5b]
        blocks = [*self.repeat, self.mixed_6a, *self.repeat_1, self.mixed_7a, *self.repeat_2, self.block8]
        return [*stem, *blocks, self.conv2d_7b]

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        x = F.adaptive_avg_pool2d(run_layers(x, self._layers()), 1).flatten(1)
        return self.classif(self.dropout(x))

    def folded(self, dtype: torch.dtype | None) -> nn.Module | None:
        """The inference form (fastcnn.optimize)."""
        features = fold_layers(self._layers(), dtype)
        return None if features is None else nn.Sequential(*features, FoldedClassifier(self.classif, dtype))


@register(image_size=299)
def inception_resnet_v1(num_classes: int = 1000, weights: Source = None, **options: object) -> InceptionResNetV1:
    """Inception-ResNet-v1: 23,995,624 parameters, 24,357,096 without facenet's head (``embedding=None``), 6.33 G mult-adds.

    As in the paper (``paper=True``) 22,756,328 parameters and 6.21 G multiply-adds at 299 x 299. Args: ``options`` as
    `InceptionResNetV1`. ``weights`` is a path or a URL of a .pth or .safetensors file with facenet-pytorch's keys, for
    example its own for 8631 faces of VGGFace2 (MIT):
    https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/20180402-114759-vggface2.pt.

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`).
        OSError: weights that cannot be read.
    """
    model = InceptionResNetV1(num_classes, **options)
    return model if weights is None else load_weights(model, weights)


@register(image_size=299)
def inception_resnet_v2(num_classes: int = 1000, weights: Source = None, dropout: float = 0.0) -> InceptionResNetV2:
    """Inception-ResNet-v2: 55,843,464 parameters and 13.16 G multiply-adds at 299 x 299.

    Args: as `InceptionResNetV2`. ``weights`` is a path or a URL of a .pth or .safetensors file with timm's keys, for
    example timm's own, converted from TensorFlow's (Apache-2.0, 80.43 % top-1):
    https://huggingface.co/timm/inception_resnet_v2.tf_in1k/resolve/main/model.safetensors.

    Raises:
        ValueError: weights that do not fit (`fastcnn.models.weights.load_weights`).
        OSError: weights that cannot be read.
    """
    model = InceptionResNetV2(num_classes, dropout)
    return model if weights is None else load_weights(model, weights)
