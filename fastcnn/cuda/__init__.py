"""The CUDA backend: depthwise convolution, dropout and capsule routing, and the fused separable forward."""

from fastcnn.cuda.availability import refuses, unavailable
from fastcnn.cuda.capsule_routing import capsule_routing_bwd, capsule_routing_fwd
from fastcnn.cuda.depthwise import depthwise_bwd, depthwise_fwd
from fastcnn.cuda.dropout import dropout_bwd, dropout_fwd, dropout_inplace
from fastcnn.cuda.separable import separable_fwd
