"""Drop-in layers over the fused ops: torch's arguments, torch's state_dict keys."""

from fastcnn.nn.avg_pool2d import AvgPool2d
from fastcnn.nn.basic_conv2d import BasicConv2d
from fastcnn.nn.branches import Branches, Fork, concat_branches
from fastcnn.nn.capsules import CapsuleLinear, MarginLoss, PrimaryCaps
from fastcnn.nn.conv_bn_act import ConvBNAct
from fastcnn.nn.dense import DenseBlock, DenseLayer, Transition
from fastcnn.nn.depthwise_conv2d import DepthwiseConv2d
from fastcnn.nn.dropout import Dropout, Dropout2d, DropPath
from fastcnn.nn.folded import FoldedChain
from fastcnn.nn.inverted_residual import InvertedResidual
from fastcnn.nn.local_response_norm import LocalResponseNorm
from fastcnn.nn.max_pool2d import MaxPool2d
from fastcnn.nn.residual import BasicBlock, Bottleneck, PreActBlock
from fastcnn.nn.separable_conv2d import SeparableConv2d
from fastcnn.nn.sequential import FusedSequential
from fastcnn.nn.sync_batch_norm import SyncBatchNorm2d, convert_sync_batchnorm

__all__ = [
    "AvgPool2d",
    "BasicBlock",
    "BasicConv2d",
    "Bottleneck",
    "Branches",
    "CapsuleLinear",
    "ConvBNAct",
    "DenseBlock",
    "DenseLayer",
    "DepthwiseConv2d",
    "DropPath",
    "Dropout",
    "Dropout2d",
    "FoldedChain",
    "Fork",
    "FusedSequential",
    "InvertedResidual",
    "LocalResponseNorm",
    "MarginLoss",
    "MaxPool2d",
    "PreActBlock",
    "PrimaryCaps",
    "SeparableConv2d",
    "SyncBatchNorm2d",
    "Transition",
    "concat_branches",
    "convert_sync_batchnorm",
]
