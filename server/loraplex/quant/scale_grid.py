"""Which weights share a scale, for formats that store one plain scale for each rectangle of a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.quant.base import Matrix, Slab

#: what the columns of a rectangle are a multiple of: no kernel sees a scale change within
STEP_COLUMNS: Final = 32
#: types that scales are stored in
SCALE_TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class ScaleGrid:
    """``rows`` by ``cols`` weights share a scale; 0 is all of them."""

    rows: int
    cols: int

    @property
    def label(self) -> str:
        """For people."""
        if self.rows > 1:
            return f"block{self.rows}x{self.cols}"
        if self.cols:
            return f"g{self.cols}"
        return "channel" if self.rows else "tensor"

    @property
    def group_rows(self) -> int:
        """Rows that share a scale in memory, where one of a whole matrix is repeated for each row."""
        return self.rows or 1

    def shape(self, matrix: Matrix) -> tuple[int, int]:
        """Of all scales of the matrix."""
        return _count(matrix.out_features, self.rows), _count(matrix.in_features, self.cols)

    def held(self, matrix: Matrix) -> int:
        """How many scales the matrix takes in memory."""
        return _count(matrix.out_features, self.group_rows) * _count(matrix.in_features, self.cols)

    def part(self, whole: torch.Tensor, slab: Slab) -> torch.Tensor:
        """Of a value for each rectangle (``shape``, or any other of as many) those of the slab, as ``PlainScales`` has
        them, in memory of their own. Raises UnsupportedFeature for a slab that begins within a rectangle."""
        _check_start(slab.rows.start, self.rows, "rows", slab)
        _check_start(slab.cols.start, self.cols, "columns", slab)
        grid = whole.reshape(self.shape(slab.matrix))
        if self.rows:
            grid = grid[slab.rows.start // self.rows : _count(slab.rows.stop, self.rows)]
        else:
            grid = grid.expand(slab.shape[0], -1)
        if self.cols:
            grid = grid[:, slab.cols.start // self.cols : _count(slab.cols.stop, self.cols)]
        return grid.clone(memory_format=torch.contiguous_format)

    def scales(self, whole: torch.Tensor, slab: Slab, key: str) -> torch.Tensor:
        """``part`` of scales. Raises InvalidModel naming ``key`` when one is not finite."""
        part = self.part(whole, slab)
        if not bool(torch.isfinite(part).all()):
            raise InvalidModel(f"tensor {key!r} holds a scale that is not finite")
        return part


TENSOR: Final = ScaleGrid(0, 0)
CHANNEL: Final = ScaleGrid(1, 0)


def _count(size: int, of: int) -> int:
    return -(-size // of) if of else 1


def _check_start(start: int, of: int, what: str, slab: Slab) -> None:
    if of and start % of:
        raise UnsupportedFeature(
            f"{slab.matrix.name}: a part of it begins at {start} {what}, allowed are multiples of {of}, which share a "
            f"scale",
            field="tensor_parallel_size",
        )
