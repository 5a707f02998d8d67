"""Classic convolutional networks, faster and smaller: drop-in PyTorch layers over fused kernels."""

from fastcnn import backends, models, nn, ops
from fastcnn.explain import explain
from fastcnn.optimize import optimize

__version__ = "0.1.0"

__all__ = ["backends", "explain", "models", "nn", "ops", "optimize"]
