"""The shapes that the CUDA kernels are tested with: around vector widths, tile edges and every template."""

from __future__ import annotations

import torch

from tests.cuda.cases import HARDSWISH, RELU, SILU, Shape, variants

BF16, F16 = torch.bfloat16, torch.float16

DEPTHWISE = variants(
    Shape(),
    {},
    {"k": 1, "h": 5, "w": 8},
    {"k": 3, "in_act": SILU, "out_act": RELU},
    {"k": 17, "stride": (2, 2)},
    {"k": 72, "n": 1, "dtype": BF16, "h": 15, "w": 30},
    {"k": 64, "dtype": F16, "stride": (2, 2), "h": 14, "w": 7},
    {"k": 7, "dtype": BF16, "slices": True},
    {"k": 24, "slices": True, "out_act": SILU},
    {"kernel": (5, 5), "padding": (2, 2), "k": 16, "dtype": BF16},
    {"kernel": (5, 5), "padding": (1, 1), "k": 12, "stride": (2, 2)},
    {"kernel": (7, 7), "padding": (3, 3), "k": 8},
    {"kernel": (7, 7), "padding": (3, 3), "k": 9, "stride": (2, 2), "dtype": F16},
    {"kernel": (3, 3), "padding": (2, 2), "dilation": (2, 2), "k": 10},
    {"kernel": (3, 5), "padding": (1, 0), "stride": (3, 2), "dilation": (2, 3), "k": 6, "w": 23, "h": 13},
    {"kernel": (31, 31), "padding": (15, 15), "k": 3, "n": 1, "h": 12, "w": 17},
    {"kernel": (9, 1), "padding": (4, 0), "k": 4, "stride": (1, 2), "dtype": BF16},
    {"multiplier": 2, "k": 5, "stride": (2, 2)},
    {"multiplier": 3, "k": 8, "dtype": BF16, "slices": True},
    {"padding": (0, 0), "k": 4, "plain": True},
    {"padding": (3, 2), "k": 6, "n": 1},
    {"n": 1, "k": 40, "h": 1, "w": 1, "dtype": BF16},
)

STATS = variants(
    Shape(stats=True, h=20, w=19),
    {"k": 17},
    {"k": 33, "mean": 1e3},
    {"k": 8, "stride": (2, 2), "plain": True},
)

SEPARABLE = variants(
    Shape(),
    {},
    {"k": 1, "channels": 1, "h": 4, "w": 4},
    {"k": 40, "channels": 72, "dtype": BF16},
    {"k": 72, "channels": 17, "dtype": BF16, "stride": (2, 2), "out_act": RELU},
    {"k": 33, "channels": 130, "dtype": F16, "n": 1, "mid_act": SILU},
    {"k": 64, "channels": 64, "dtype": BF16, "plain": True},
    {"k": 24, "channels": 70, "slices": True, "mid_act": HARDSWISH},
    {"k": 16, "channels": 16, "dtype": BF16, "slices": True, "h": 17, "w": 5},
    {"kernel": (5, 5), "padding": (2, 2), "k": 10, "channels": 12},
    {"kernel": (3, 3), "padding": (2, 2), "dilation": (2, 2), "k": 18, "channels": 96, "dtype": F16},
    {"multiplier": 2, "k": 7, "channels": 9, "dtype": BF16},
    {"k": 17, "channels": 33, "stats": True},
    {"k": 17, "channels": 33, "stats": True, "mean": 1e3, "h": 18},
    {"k": 96, "channels": 136, "stats": True, "dtype": BF16, "n": 1},
    {"k": 700, "channels": 20, "n": 1, "h": 2, "w": 4},
)

# Pixels per product, with a shape for each tile of the product that is compiled.
PRODUCTS = {
    "f32-32x64": (32, Shape(k=24, channels=70, n=1)),
    "f32-64x64": (64, Shape(k=40, channels=20, n=1)),
    "bf16-32x128": (32, Shape(k=72, channels=66, n=1, dtype=BF16, stride=(2, 2))),
    "bf16-64x64": (64, Shape(k=33, channels=40, n=1, dtype=BF16)),
    "bf16-64x128": (64, Shape(k=24, channels=130, n=1, dtype=BF16, stride=(2, 2))),
    "bf16-128x128": (128, Shape(k=40, channels=136, n=1, dtype=BF16)),
    "f16-128x128-stats": (128, Shape(k=24, channels=72, dtype=F16, stats=True)),
}

# Layers of MobileNet-v2 and Xception, a batch that spreads over every multiprocessor.
MODEL_LAYERS = variants(
    Shape(n=8, slices=False),
    {"k": 144, "h": 56, "w": 56, "channels": 24, "dtype": BF16},
    {"k": 144, "h": 56, "w": 56, "channels": 32, "stride": (2, 2), "dtype": F16},
    {"k": 960, "h": 7, "w": 7, "channels": 320, "dtype": BF16},
    {"k": 728, "h": 19, "w": 19, "channels": 728, "dtype": BF16},
    {"k": 1536, "h": 10, "w": 10, "channels": 2048, "dtype": BF16},
    {"k": 128, "h": 147, "w": 147, "channels": 128, "dtype": torch.float32, "n": 2},
    {"k": 64, "h": 28, "w": 28, "kernel": (31, 31), "padding": (15, 15), "dtype": F16},
)
