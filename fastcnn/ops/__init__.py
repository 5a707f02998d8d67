"""Fused convolution ops, forward and backward, on every backend.

``conv_chain`` is the unit that all others are written in; the primitives are torch.ops.fastcnn.<name>.
"""

from fastcnn.ops import affine_act
from fastcnn.ops.conv2d import conv2d
from fastcnn.ops.conv_bn_act import conv_bn_act
from fastcnn.ops.conv_chain import Affine, BatchNorm, Conv, conv_chain
from fastcnn.ops.depthwise_conv2d import depthwise_conv2d
from fastcnn.ops.inverted_residual import inverted_residual
from fastcnn.ops.max_pool2d import max_pool2d
from fastcnn.ops.pointwise_conv2d import pointwise_conv2d
from fastcnn.ops.separable_conv2d import separable_conv2d

__all__ = [
    "Affine",
    "BatchNorm",
    "Conv",
    "affine_act",
    "conv2d",
    "conv_bn_act",
    "conv_chain",
    "depthwise_conv2d",
    "inverted_residual",
    "max_pool2d",
    "pointwise_conv2d",
    "separable_conv2d",
]
