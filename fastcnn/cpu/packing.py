"""Weight matrices in the panels that the matrix-product core reads, for the active instruction set."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, pointer


class PackedMatrix:
    """A product's weight in the panels that the active instruction set reads; stands in for the weight it was made of.

    Attributes:
        shape: of that weight.
        dtype: that the product computes in.
    """

    __slots__ = ("_data", "_isa", "_matrix", "dtype", "shape")

    def __init__(self, matrix: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
        """matrix [n, k] of a forward product; shape of the weight that it came from."""
        self.shape, self.dtype, self._matrix = shape, dtype, matrix
        self._isa: str | None = None

    def bytes(self) -> Tensor:
        """The packed bytes, made again when another instruction set has become active."""
        isa = native.module().isa_active()
        if isa != self._isa:
            self._data, self._isa = _pack(self._matrix, False, self.dtype), isa
        return self._data


def _pack(matrix: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
    """B = matrix^T (a forward's [k, n]) or, transposed, B = matrix (a dgrad's [n, k])."""
    module, code = native.module(), DTYPE_CODES[dtype]
    if matrix.dtype not in DTYPE_CODES:
        matrix = matrix.float()
    rows, columns = matrix.shape
    k, n = (rows, columns) if transposed else (columns, rows)
    stride_k, stride_n = matrix.stride() if transposed else matrix.stride()[::-1]
    data = torch.empty(module.packed_bytes(k, n, code), dtype=torch.uint8)
    module.pack_matrix(k, n, DTYPE_CODES[matrix.dtype], pointer(matrix), stride_k, stride_n, 0, code, data.data_ptr())
    return data


def _matrix(weight: Tensor) -> Tensor:
    return weight.detach().reshape(weight.shape[0], -1)


def pack_pointwise(weight: Tensor, dtype: torch.dtype) -> PackedMatrix:
    """Packs a pointwise weight [n, k, 1, 1] for forward products computed in dtype."""
    return PackedMatrix(_matrix(weight), weight.shape, dtype)


def packed_forward(weight: Tensor | PackedMatrix, dtype: torch.dtype) -> Tensor:
    """The packed bytes of a forward's weight; packs now what was not packed before."""
    return weight.bytes() if isinstance(weight, PackedMatrix) else _pack(_matrix(weight), False, dtype)


def packed_dgrad(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The packed bytes of a data gradient's weight."""
    return _pack(_matrix(weight), True, dtype)
