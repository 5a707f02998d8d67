"""The CPU backend: C++ kernels, one algorithm per op, compiled per instruction set."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastcnn import backends, native
from fastcnn.cpu import dense_block
from fastcnn.cpu.affine_act import (
    affine_act_dgrad,
    affine_act_fwd,
    affine_act_into,
    affine_act_sums,
    channel_statistics,
    residual_act_bwd,
)
from fastcnn.cpu.arguments import floats
from fastcnn.cpu.avg_pool2d import avg_pool2d_bwd, avg_pool2d_fwd
from fastcnn.cpu.capsule_routing import capsule_routing_bwd, capsule_routing_fwd
from fastcnn.cpu.conv2d import conv2d_bwd, conv2d_dropout_into, conv2d_fwd, conv2d_into, pack_conv2d
from fastcnn.cpu.dense_block import widened
from fastcnn.cpu.depthwise_conv2d import depthwise_bwd, depthwise_fwd
from fastcnn.cpu.dropout import dropout_bwd, dropout_fwd, dropout_inplace
from fastcnn.cpu.local_response_norm import local_response_norm_bwd, local_response_norm_fwd
from fastcnn.cpu.max_pool2d import max_pool2d_bwd, max_pool2d_fwd, max_pool2d_into
from fastcnn.cpu.measured import faster_unfused
from fastcnn.cpu.packing import PackedWeight, pack_pointwise
from fastcnn.cpu.pointwise_conv2d import pointwise_bwd, pointwise_bwd_into, pointwise_fwd, pointwise_into
from fastcnn.cpu.separable_conv2d import inverted_residual_fwd, separable_fwd
from fastcnn.cpu.squash import squash_bwd, squash_fwd

__all__ = [
    "PackedWeight", "affine_act_dgrad", "affine_act_fwd", "affine_act_into", "affine_act_sums", "avg_pool2d_bwd",
    "avg_pool2d_fwd", "capsule_routing_bwd", "capsule_routing_fwd", "channel_statistics", "conv2d_bwd",
    "conv2d_dropout_into", "conv2d_fwd", "conv2d_into", "depthwise_bwd", "depthwise_fwd", "dropout_bwd", "dropout_fwd",
    "dropout_inplace", "inverted_residual_fwd", "local_response_norm_bwd", "local_response_norm_fwd", "max_pool2d_bwd",
    "max_pool2d_fwd", "max_pool2d_into", "pack_conv2d", "pack_pointwise", "pointwise_bwd", "pointwise_bwd_into",
    "pointwise_fwd", "pointwise_into", "residual_act_bwd", "separable_fwd", "squash_bwd", "squash_fwd", "widened",
]  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16)
COMPOSITES = {"dense_block": dense_block}
# How each of a forward's leading weights is prepared once, for calls with constant weights.
_PACKERS = {
    "pointwise_fwd": (pack_pointwise,),
    "depthwise_fwd": (None,),
    "separable_fwd": (None, pack_pointwise),
    "inverted_residual_fwd": (pack_pointwise, None, pack_pointwise),
}


def unavailable() -> str | None:
    """Why no primitive runs on the CPU backend here, or None."""
    return None if native.module() else "the native module was not built (FASTCNN_NATIVE=off)"


def pack_arguments(primitive: str, before: tuple, after: tuple, dtype: torch.dtype) -> tuple:
    """A forward primitive's arguments ``before`` its residual, with weights packed for dtype and vectors in float32.

    ``after`` are the arguments after the residual.
    """
    packers = _PACKERS.get(primitive, ())
    if primitive == "conv2d_fwd":
        packers = (partial(pack_conv2d, groups=after[-2]),)
    packers += (None,) * len(before)
    return tuple(
        pack(value, dtype) if pack and value is not None else floats(value) if isinstance(value, Tensor) else value
        for value, pack in zip(before, packers)
    )


def _refuses_shape(primitive: str, args: Sequence) -> str | None:
    if primitive == "inverted_residual_fwd" and args[2].shape[0] != args[1].shape[0]:
        return "the fused block takes a depth multiplier of 1"
    return None


def yields(primitive: str, args: Sequence) -> str | None:
    """Why this call should rather run on the unfused backend, or None."""
    reason = faster_unfused(primitive, args)
    return reason if reason and backends.refusal("unfused", primitive, args) is None else None


def refuses(primitive: str, args: Sequence) -> str | None:
    """Why this call is not for the CPU backend, or None."""
    x = args[0]
    if x.dtype not in DTYPES:
        return f"the cpu backend computes in float32 and bfloat16, got {x.dtype}"
    if x.device.type != "cpu":
        return f"the cpu backend takes CPU tensors, got one on {x.device}"
    return _refuses_shape(primitive, args)
