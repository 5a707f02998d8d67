"""Weights in the panels that the matrix-product core reads, for the active instruction set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, pointer


class PackedWeight:
    """A product's weight in the panels that the active instruction set reads; stands in for the weight it was made of.

    Attributes:
        shape: of that weight.
        dtype: that the product computes in.
    """

    __slots__ = ("_pack", "_packed", "dtype", "shape")

    def __init__(self, pack: Callable[[], Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        """pack makes the bytes for the instruction set that is active when it is called."""
        self.shape, self.dtype, self._pack = shape, dtype, pack
        self._packed: dict[str, Tensor] = {}

    def bytes(self) -> Tensor:
        """The packed bytes for the active instruction set; those for another one stay where they are."""
        isa = native.module().isa_active()
        if isa not in self._packed:
            self._packed[isa] = self._pack()
        return self._packed[isa]


def source(weight: Tensor) -> Tensor:
    """The weight in a dtype that the packing kernels read."""
    weight = weight.detach()
    return weight if weight.dtype in DTYPE_CODES else weight.float()


def _pack(matrix: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
    """B = matrix^T (a forward's [k, n]) or, transposed, B = matrix (a dgrad's [n, k])."""
    module, code, matrix = native.module(), DTYPE_CODES[dtype], source(matrix)
    rows, columns = matrix.shape
    k, n = (rows, columns) if transposed else (columns, rows)
    stride_k, stride_n = matrix.stride() if transposed else matrix.stride()[::-1]
    data = torch.empty(module.packed_bytes(k, n, code), dtype=torch.uint8)
    module.pack_matrix(k, n, DTYPE_CODES[matrix.dtype], pointer(matrix), stride_k, stride_n, code, data.data_ptr())
    return data


def _matrix(weight: Tensor) -> Tensor:
    return weight.detach().reshape(weight.shape[0], -1)


def pack_pointwise(weight: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Packs a pointwise weight [n, k, 1, 1] for forward products computed in dtype."""
    return PackedWeight(partial(_pack, _matrix(weight), False, dtype), weight.shape, dtype)


def packed_forward(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor:
    """The packed bytes of a forward's weight; packs now what was not packed before."""
    return weight.bytes() if isinstance(weight, PackedWeight) else _pack(_matrix(weight), False, dtype)


def packed_dgrad(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The packed bytes of a data gradient's weight."""
    return _pack(_matrix(weight), True, dtype)
