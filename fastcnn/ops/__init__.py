"""Fused convolution ops, forward and backward, on every backend."""

from fastcnn.ops import affine_act, conv2d, depthwise_conv2d, inverted_residual, pointwise_conv2d, separable_conv2d
