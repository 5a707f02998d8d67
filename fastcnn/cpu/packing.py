"""Weight matrices in the panels that the matrix-product core reads, for the active instruction set."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcnn import native
from fastcnn.cpu.arguments import DTYPE_CODES, pointer


class PackedMatrix:
    """B [k, n] of a product, packed; stands in for a pointwise weight [n, k, 1, 1] wherever the CPU backend takes one.

    Attributes:
        shape: of the weight that it stands in for.
        isa: the instruction set whose layout this is.
    """

    __slots__ = ("data", "dtype", "isa", "shape")

    def __init__(self, shape: torch.Size, dtype: torch.dtype, data: Tensor, isa: str) -> None:
        self.shape, self.dtype, self.data, self.isa = shape, dtype, data, isa


def _pack(matrix: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
    """B = matrix^T (a forward's [k, n]) or, transposed, B = matrix (a dgrad's [n, k])."""
    module, code = native.module(), DTYPE_CODES[dtype]
    if matrix.dtype not in DTYPE_CODES:
        matrix = matrix.float()
    rows, columns = matrix.shape
    k, n = (rows, columns) if transposed else (columns, rows)
    stride_k, stride_n = matrix.stride() if transposed else matrix.stride()[::-1]
    data = torch.empty(module.packed_bytes(k, n, code), dtype=torch.uint8)
    module.pack_matrix(
        k, n, DTYPE_CODES[matrix.dtype], pointer(matrix), stride_k, stride_n, 0, code, data.data_ptr()
    )
    return data


def pack_pointwise(weight: Tensor, dtype: torch.dtype) -> PackedMatrix:
    """Packs a pointwise weight [n, k, 1, 1] for forward products computed in dtype."""
    matrix = weight.detach().reshape(weight.shape[0], -1)
    return PackedMatrix(weight.shape, dtype, _pack(matrix, False, dtype), native.module().isa_active())


def packed_forward(weight: Tensor | PackedMatrix, dtype: torch.dtype) -> Tensor:
    """The packed bytes of a forward's weight; packs now what was not packed before."""
    if isinstance(weight, PackedMatrix):
        return weight.data
    return _pack(weight.detach().reshape(weight.shape[0], -1), False, dtype)


def packed_dgrad(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The packed bytes of a data gradient's weight."""
    return _pack(weight.detach().reshape(weight.shape[0], -1), True, dtype)
