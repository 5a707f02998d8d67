"""Classic convolutional networks, faster and smaller: drop-in PyTorch layers over fused kernels."""

__version__ = "0.1.0"
