"""Products with quantized matrices, written to be checked by eye: decode everything, then multiply in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraplex_kernels.quant import QuantMatrix
from loraplex_kernels.quant.stored import StoredMatrix, decode, decode_rows


class ReferenceMatrix:
    """The parts as they are."""

    def __init__(self, parts: Sequence[StoredMatrix], dtype: torch.dtype) -> None:
        self.shape = stacked_shape(parts)
        self.nbytes = sum(part.nbytes for part in parts)
        self._parts = tuple(parts)
        self._dtype = dtype

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = x.float() @ self.dequantize().float().T
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def dequantize(self) -> torch.Tensor:
        return torch.cat([decode(part, self._dtype) for part in self._parts])

    def look_up(self, indices: torch.Tensor) -> torch.Tensor:
        return look_up(self._parts, indices, self._dtype)


class ReferenceQuant:
    """Runs everywhere."""

    name = "reference"

    def matrix(self, parts: Sequence[StoredMatrix], dtype: torch.dtype) -> QuantMatrix:
        return ReferenceMatrix(parts, dtype)


def stacked_shape(parts: Sequence[StoredMatrix]) -> tuple[int, int]:
    """Of all parts, stacked by rows. Raises ValueError when their columns differ."""
    columns = {part.shape[1] for part in parts}
    if len(columns) != 1:
        raise ValueError(f"stacked parts have {sorted(columns)} columns, expected one number")
    return sum(part.shape[0] for part in parts), columns.pop()


def look_up(parts: Sequence[StoredMatrix], indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of stacked parts in ``dtype``. Embeddings are one part; of several, rows are gathered part by part."""
    if len(parts) == 1:
        return decode_rows(parts[0], indices, dtype)
    found = torch.empty(len(indices), parts[0].shape[1], dtype=dtype, device=indices.device)
    first = 0
    for part in parts:
        mine = (indices >= first) & (indices < first + part.shape[0])
        found[mine] = decode_rows(part, indices[mine] - first, dtype)
        first += part.shape[0]
    return found
