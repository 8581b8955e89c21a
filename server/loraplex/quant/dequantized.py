"""A quantized checkpoint served dense (``--quantization none``): stored in one form, held in the compute dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loraplex.quant.base import Expected, Grain, Matrix, QuantFormat, Slab, WeightReader
from loraplex_kernels.quant.stored import StoredMatrix


@dataclass(frozen=True, slots=True)
class DequantizedFormat:
    """How the checkpoint stores its matrices is ``stored``'s to say (``QuantFormat``); ``Storage`` keeps none of them
    so."""

    stored: QuantFormat

    @property
    def name(self) -> str:
        return "none"

    def holds(self, matrix: Matrix, keys: frozenset[str]) -> bool:
        return self.stored.holds(matrix, keys)

    def tensors(self, matrix: Matrix, keys: frozenset[str]) -> Mapping[str, Expected]:
        return self.stored.tensors(matrix, keys)

    def check(self, matrix: Matrix, reader: WeightReader) -> None:
        self.stored.check(matrix, reader)

    def grain(self, matrix: Matrix) -> Grain:
        return self.stored.grain(matrix)

    def nbytes(self, matrix: Matrix) -> int | None:
        return None

    def read(self, reader: WeightReader, slab: Slab) -> StoredMatrix:
        return self.stored.read(reader, slab)


def stored_format(quant_format: QuantFormat) -> QuantFormat:
    """The form that a checkpoint is in, however its matrices are held."""
    return quant_format.stored if isinstance(quant_format, DequantizedFormat) else quant_format
