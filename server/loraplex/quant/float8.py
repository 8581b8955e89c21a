"""Codes of float8_e4m3fn, one a byte, as checkpoints of several formats hold them."""

from __future__ import annotations

from typing import Final

import torch

from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.quant.base import Expected, Matrix, Slab, WeightReader
from loraplex_kernels.quant.packing import pack

#: types that a weight may have in a file: what is not served is known, and refused by name
_STORED: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
_NAN: Final = 0x7F


def expected_codes(matrix: Matrix) -> Expected:
    """What the tensor of codes must be; ``check_codes`` says the rest."""
    return Expected((matrix.out_features, matrix.in_features), _STORED)


def check_codes(matrix: Matrix, reader: WeightReader) -> None:
    """Raises UnsupportedFeature naming the tensor, when it is of another float8 than e4m3fn."""
    dtype = reader.dtype(matrix.key)
    if dtype is not torch.float8_e4m3fn:
        raise UnsupportedFeature(f"tensor {matrix.key!r} is {dtype}, supported is torch.float8_e4m3fn")


def read_codes(reader: WeightReader, slab: Slab) -> torch.Tensor:
    """Packed codes of the slab, uint8 ``[rows, row_bytes]``. Raises InvalidModel naming the tensor for a NaN."""
    codes = pack(reader.tensor(slab.key, slab.rows, slab.cols).view(torch.uint8), 8)
    if bool(((codes & _NAN) == _NAN).any()):
        raise InvalidModel(f"tensor {slab.key!r} holds NaN (code 0x7f or 0xff), expected numbers")
    return codes
