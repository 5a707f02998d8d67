"""Drop-in layers over the fused ops: torch's arguments, torch's state_dict keys."""

from fastcnn.nn.conv_norm_act import ConvNormAct
from fastcnn.nn.depthwise_conv2d import DepthwiseConv2d
from fastcnn.nn.folded import FoldedChain
from fastcnn.nn.inverted_residual import InvertedResidual
from fastcnn.nn.separable_conv2d import SeparableConv2d

__all__ = ["ConvNormAct", "DepthwiseConv2d", "FoldedChain", "InvertedResidual", "SeparableConv2d"]
