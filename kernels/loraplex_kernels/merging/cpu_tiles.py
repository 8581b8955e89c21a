"""Tiles of merged matrices' operands, multiplied out in registers: what the kernels that go over their values share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from loraplex_kernels.cpu_ir import F32, I32, I64, PTR, Value, has_kernel, loop
from loraplex_kernels.cpu_math import Numbers
from loraplex_kernels.lanes import LANES

#: int64 fields of a term, in order; strides are in bytes, scale, bound and weight the bits of floats, bits may be 0
TERM_FIELDS: Final = (
    *("left", "left_row", "left_step", "right", "right_row", "rank", "scale", "bound", "weight", "bits"),
)
#: rows of a tile
ROWS: Final = 4
#: vectors of a tile's row, where there are 32 registers of 64 bytes, and where there are 16 of 32
_WIDE, _NARROW = 4, 1


def tile_vectors(processor: str = "") -> int:
    """Of a tile's row. ``processor``: as in ``compile_function``."""
    return _WIDE if not processor and has_kernel(torch.float32) else _NARROW


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows of the block, and ``vectors`` of their columns from ``column`` on; of these what is in ``mask``."""

    row: Value
    column: Value
    vectors: int
    mask: Value | None


class Tiles(Numbers):
    """Goes over a block's tiles: its columns, and of these the rows. ``has_left``: operands are products."""

    def __init__(self, dtype: torch.dtype, *, has_left: bool, vectors: int) -> None:
        super().__init__(dtype)
        self._has_left, self._item, self._most = has_left, dtype.itemsize, vectors

    def over(self, b: Value, num_rows: Value, num_columns: Value, body: Callable[[Tile], None]) -> None:
        """``body`` for each tile."""
        wide = I64(LANES * self._most)
        whole = b.udiv(num_columns, wide)
        done = b.mul(whole, wide)
        left = b.sub(num_columns, done)

        def rows(column: Value, vectors: int, mask: Value | None) -> None:
            def one(index: Value, _: list[Value]) -> list[Value]:
                body(Tile(b.mul(index, I64(ROWS)), column, vectors, mask))
                return []

            loop(b, b.udiv(b.add(num_rows, I64(ROWS - 1)), I64(ROWS)), (), one)

        def one_wide(index: Value, _: list[Value]) -> list[Value]:
            rows(b.mul(index, wide), self._most, None)
            return []

        def one_single(index: Value, _: list[Value]) -> list[Value]:
            first = b.mul(index, I64(LANES))
            rows(b.add(done, first), 1, self.tail_mask(b, b.sub(left, first)))
            return []

        loop(b, whole, (), one_wide)
        loop(b, b.udiv(b.add(left, I64(LANES - 1)), I64(LANES)), (), one_single)

    def operand(self, b: Value, term: dict[str, Value], tile: Tile, rows: list[Value], column: Value) -> list[Value]:
        """A tile's vectors of a term's operand, before its scale: row by row. ``rows`` and ``column`` are the whole
        matrix's."""
        offset = b.mul(column, I64(self._item))

        def right(row: Value) -> list[Value]:
            start = b.inttoptr(b.add(term["right"], b.add(offset, b.mul(row, term["right_row"]))), PTR)
            places = [self.at(b, start, I64(v * LANES * self._item)) for v in range(tile.vectors)]
            return [self.read(b, place, tile.mask, self.dtype) for place in places]

        if not self._has_left:
            return [vector for row in rows for vector in right(row)]
        lefts = [b.add(term["left"], b.mul(row, term["left_row"])) for row in rows]

        def step(k: Value, sums: list[Value]) -> list[Value]:
            vectors, new = right(k), []
            for i, left in enumerate(lefts):
                place = b.inttoptr(b.add(left, b.mul(k, term["left_step"])), PTR)
                factor = self.splat(b, self.read_one(b, place), LANES)
                new += [self.fma(b, factor, vector, sums[i * tile.vectors + v]) for v, vector in enumerate(vectors)]
            return new

        return loop(b, term["rank"], [self.constant(0.0)] * (ROWS * tile.vectors), step)

    def float_of(self, b: Value, bits: Value) -> Value:
        """In all lanes, of its bits."""
        return self.splat(b, b.bitcast(b.trunc(bits, I32), F32), LANES)

    def size(self, b: Value, value: Value) -> Value:
        return b.call(self.declare("llvm.fabs.v16f32", self.floats, self.floats), [value])
