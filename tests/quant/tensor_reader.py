"""One matrix of a checkpoint in memory, for tests of what a format reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loraplex.quant.base import WHOLE, Matrix, QuantFormat, Slab
from loraplex_kernels.quant.stored import StoredMatrix, decode

NAME = "model.layers.0.mlp.down_proj"


class TensorReader:
    """Tensors by name (``WeightReader``)."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], name: str = NAME) -> None:
        """``tensors`` by their names below that of a module."""
        self._tensors = {f"{name}.{end}": tensor.clone() for end, tensor in tensors.items()}

    def keys(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def tensor(self, key: str, rows: slice = WHOLE, cols: slice = WHOLE) -> torch.Tensor:
        tensor = self._tensors[key]
        if tensor.dim() < 2:
            return tensor[rows] if tensor.dim() else tensor
        return tensor[rows, cols]


def read(
    quant_format: QuantFormat, reader: TensorReader, matrix: Matrix, rows: slice = WHOLE, cols: slice = WHOLE
) -> StoredMatrix:
    """A slab of a matrix, after the checks that a loader makes of it alone."""
    assert quant_format.holds(matrix, reader.keys())
    expected = quant_format.tensors(matrix, reader.keys())
    found = reader.keys()
    assert found <= expected.keys()
    for key in found:
        assert expected[key].shape in (None, reader.shape(key)), key
        assert reader.dtype(key) in expected[key].dtypes, key
    quant_format.check(matrix, reader)
    bounds = slice(*rows.indices(matrix.out_features)), slice(*cols.indices(matrix.in_features))
    return quant_format.read(reader, Slab(matrix, bounds[0], bounds[1]))


def weight(
    quant_format: QuantFormat, reader: TensorReader, matrix: Matrix, rows: slice = WHOLE, cols: slice = WHOLE
) -> torch.Tensor:
    """What a slab stands for, float32; its memory is no view of the checkpoint's."""
    stored = read(quant_format, reader, matrix, rows, cols)
    expected = decode(stored, torch.float32)
    for key in sorted(reader.keys()):
        reader.tensor(key).zero_()
    assert torch.equal(decode(stored, torch.float32), expected)
    return expected
