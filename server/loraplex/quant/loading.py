"""From a checkpoint to the weight of one layer, whatever forms its matrices are stored in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from loraplex.quant.base import Placement, QuantFormat, Rows, Slab, Weight, WeightReader
from loraplex.quant.dense import PlainWeight, load_dense
from loraplex.quant.dequantized import DequantizedFormat
from loraplex_kernels.lora import LoraTable
from loraplex_kernels.quant import Joined, QuantBackend, QuantMatrix
from loraplex_kernels.quant.stored import StoredMatrix, decode


@dataclass(frozen=True, slots=True)
class Storage:
    """What weights are made of: where they are read, in which form, and where and by what they are multiplied."""

    reader: WeightReader
    format: QuantFormat
    placement: Placement
    backend: QuantBackend

    def weight(self, slabs: Sequence[Slab]) -> Weight:
        """The slabs, stacked by rows in order. What the checkpoint has dense stays dense."""
        weights = [
            self._quantized(tuple(run)) if is_quantized else self._dense(tuple(run))
            for is_quantized, run in groupby(slabs, self._stays_quantized)
        ]
        return weights[0] if len(weights) == 1 else StackedWeight(tuple(weights))

    def rows(self, slab: Slab) -> Rows:
        """One slab whose rows are looked up."""
        if self._stays_quantized(slab):
            return self._quantized((slab,))
        kept = self._tensor(slab).to(device=self.placement.device, dtype=self.placement.dtype, copy=True)
        return PlainWeight(kept.contiguous())

    def _stays_quantized(self, slab: Slab) -> bool:
        return not isinstance(self.format, DequantizedFormat) and self._is_quantized(slab)

    def _is_quantized(self, slab: Slab) -> bool:
        return self.format.holds(slab.matrix, self.reader.keys())

    def _dense(self, slabs: tuple[Slab, ...]) -> Weight:
        shape = sum(slab.shape[0] for slab in slabs), slabs[0].shape[1]
        return load_dense(map(self._tensor, slabs), shape, self.placement)

    def _tensor(self, slab: Slab) -> torch.Tensor:
        """A slab that is held dense, on the host."""
        if self._is_quantized(slab):
            return decode(self.format.read(self.reader, slab), self.placement.dtype)
        return self.reader.tensor(slab.key, slab.rows, slab.cols)

    def _quantized(self, slabs: tuple[Slab, ...]) -> QuantizedWeight:
        device = self.placement.device
        by_matrix = groupby(slabs, lambda slab: slab.matrix.name)
        parts = [part.to(device) for _, own in by_matrix for part in self._joined(own)]
        return QuantizedWeight(self.backend.matrix(parts, self.placement.dtype))

    def _joined(self, slabs: Iterable[Slab]) -> list[StoredMatrix]:
        """Slabs of one matrix, which the layer's adapters know as one part, as one where they can be."""
        parts: list[StoredMatrix] = []
        for slab in slabs:
            part = self.format.read(self.reader, slab)
            both = parts[-1].above(part) if parts else None
            if both is None:
                parts.append(part)
            else:
                parts[-1] = both
        return parts


class QuantizedWeight:
    """A quantized matrix (``Weight``, and ``Rows``) in its backend's hands."""

    __slots__ = ("_matrix", "dequantize", "join", "look_up", "matmul")

    def __init__(self, matrix: QuantMatrix) -> None:
        self._matrix = matrix
        self.matmul = matrix.multiply
        self.join = matrix.join
        self.dequantize = matrix.dequantize
        self.look_up = matrix.look_up

    @property
    def shape(self) -> tuple[int, int]:
        return self._matrix.shape

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes


@dataclass(frozen=True, slots=True)
class StackedWeight:
    """Weights of unlike forms, stacked by rows."""

    parts: tuple[Weight, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        sizes = [part.shape[0] for part in self.parts]
        biases = (None,) * len(sizes) if bias is None else torch.split(bias, sizes)
        return torch.cat([part.matmul(x, own) for part, own in zip(self.parts, biases, strict=True)], 1)

    def join(self, table: LoraTable) -> Joined | None:
        return None

    def dequantize(self) -> torch.Tensor:
        return torch.cat([part.dequantize() for part in self.parts])
