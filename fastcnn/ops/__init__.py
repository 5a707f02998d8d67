"""Fused convolution ops, dropout and capsule routing, forward and backward, on every backend.

``conv_chain`` is the unit that all others are written in; the primitives are torch.ops.fastcnn.<name>.
"""

from fastcnn.ops import affine_act, conv2d_dropout
from fastcnn.ops.avg_pool2d import avg_pool2d
from fastcnn.ops.capsule_routing import capsule_votes_routing
from fastcnn.ops.conv2d import conv2d
from fastcnn.ops.conv_bn_act import conv_bn_act
from fastcnn.ops.conv_chain import conv_chain
from fastcnn.ops.dense_block import dense_block
from fastcnn.ops.dense_layers import DenseLayer
from fastcnn.ops.depthwise_conv2d import depthwise_conv2d
from fastcnn.ops.dropout import drop_path, dropout, dropout2d
from fastcnn.ops.inverted_residual import inverted_residual
from fastcnn.ops.local_response_norm import local_response_norm
from fastcnn.ops.max_pool2d import max_pool2d
from fastcnn.ops.normalisation import Affine, BatchNorm
from fastcnn.ops.pointwise_conv2d import pointwise_conv2d
from fastcnn.ops.separable_conv2d import separable_conv2d
from fastcnn.ops.squash import squash
from fastcnn.ops.stages import Conv

__all__ = [
    "Affine",
    "BatchNorm",
    "Conv",
    "DenseLayer",
    "affine_act",
    "avg_pool2d",
    "capsule_votes_routing",
    "conv2d",
    "conv2d_dropout",
    "conv_bn_act",
    "conv_chain",
    "dense_block",
    "depthwise_conv2d",
    "drop_path",
    "dropout",
    "dropout2d",
    "inverted_residual",
    "local_response_norm",
    "max_pool2d",
    "pointwise_conv2d",
    "separable_conv2d",
    "squash",
]
