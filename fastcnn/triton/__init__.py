"""The Triton backend: every fused op on every GPU that Triton runs on, with no compiler at hand.

Under TRITON_INTERPRET=1 (set before triton is imported) the same kernels run on CPU tensors, slowly: for tests.
"""

from fastcnn.triton.affine_act import affine_act_fwd, affine_act_into, affine_act_sums
from fastcnn.triton.affine_act_bwd import affine_act_dgrad, channel_statistics, residual_act_bwd
from fastcnn.triton.avg_pool2d import avg_pool2d_bwd, avg_pool2d_fwd
from fastcnn.triton.capsule_routing import capsule_routing_fwd
from fastcnn.triton.capsule_routing_bwd import capsule_routing_bwd
from fastcnn.triton.conv2d import conv2d_fwd, conv2d_into
from fastcnn.triton.conv2d_bwd import conv2d_bwd
from fastcnn.triton.conv2d_dropout import conv2d_dropout_into
from fastcnn.triton.dense_block import widened
from fastcnn.triton.depthwise_conv2d import depthwise_fwd
from fastcnn.triton.depthwise_conv2d_bwd import depthwise_bwd
from fastcnn.triton.dropout import dropout_bwd, dropout_fwd, dropout_inplace
from fastcnn.triton.inverted_residual import inverted_residual_fwd
from fastcnn.triton.launch import refuses, unavailable
from fastcnn.triton.local_response_norm import local_response_norm_bwd, local_response_norm_fwd
from fastcnn.triton.pointwise_conv2d import pointwise_fwd, pointwise_into
from fastcnn.triton.pointwise_conv2d_bwd import pointwise_bwd, pointwise_bwd_into
from fastcnn.triton.separable_conv2d import separable_fwd
from fastcnn.triton.squash import squash_bwd, squash_fwd

__all__ = [
    "affine_act_dgrad",
    "affine_act_fwd",
    "affine_act_into",
    "affine_act_sums",
    "avg_pool2d_bwd",
    "avg_pool2d_fwd",
    "capsule_routing_bwd",
    "capsule_routing_fwd",
    "channel_statistics",
    "conv2d_bwd",
    "conv2d_dropout_into",
    "conv2d_fwd",
    "conv2d_into",
    "depthwise_bwd",
    "depthwise_fwd",
    "dropout_bwd",
    "dropout_fwd",
    "dropout_inplace",
    "inverted_residual_fwd",
    "local_response_norm_bwd",
    "local_response_norm_fwd",
    "pointwise_bwd",
    "pointwise_bwd_into",
    "pointwise_fwd",
    "pointwise_into",
    "refuses",
    "residual_act_bwd",
    "separable_fwd",
    "squash_bwd",
    "squash_fwd",
    "unavailable",
    "widened",
]
