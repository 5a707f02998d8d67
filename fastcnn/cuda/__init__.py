"""The CUDA backend: depthwise convolution forward and backward, and the fused separable forward."""

from fastcnn.cuda.availability import refuses, unavailable
from fastcnn.cuda.depthwise import depthwise_bwd, depthwise_fwd
from fastcnn.cuda.separable import separable_fwd
