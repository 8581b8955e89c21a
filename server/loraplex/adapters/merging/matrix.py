"""Matrices that are never whole: whatever is done to a site's dense change is done to one block of it after another.

A block is computed when it is looked at, and forgotten after that: a dense change takes no memory, of whatever size it
is, and what is done to one block stays in the processor's cache. What goes through a matrix twice has it computed
twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch

#: elements of a block: as many as have work for longer than two threads take to hand Python to each other
BLOCK_ELEMENTS: Final = 5 << 14
#: of a large matrix's block, this part of it, or at most so many elements
_LARGE_PART: Final = 128
_LARGE_BLOCK_ELEMENTS: Final = 1 << 18
#: a block's rows, or columns, are a multiple of it: whole tiles of the compiled kernel
_STEP: Final = 64
#: of a block, that are there in float64
_SQUARED_ELEMENTS: Final = 5 << 13


class Block(NamedTuple):
    """Where a block lies."""

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def transpose(self) -> Block:
        return Block(self.columns, self.rows)


class Matrix(Protocol):
    """Of float32 ``[rows, columns]``."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def fill(self, at: Block, out: torch.Tensor) -> None:
        """Write its values there into ``out``, which is contiguous; of the same block the same every time, to the
        bit."""
        ...


def blocks(matrix: Matrix, elements: int = BLOCK_ELEMENTS) -> list[Block]:
    """What it is cut into: along its longer side, each with all of the shorter one."""
    if isinstance(matrix, Transpose):
        return [at.transpose for at in blocks(matrix.matrix, elements)]
    rows, columns = matrix.shape
    step = max(1, block_elements(rows, columns, elements) // min(rows, columns) // _STEP) * _STEP
    cuts = [slice(at, min(at + step, max(rows, columns))) for at in range(0, max(rows, columns), step)]
    return [Block(cut, slice(0, columns)) if rows > columns else Block(slice(0, rows), cut) for cut in cuts]


def block_elements(rows: int, columns: int, elements: int = BLOCK_ELEMENTS) -> int:
    """Of a block of such a matrix, about."""
    return max(elements, min(rows * columns // _LARGE_PART, _LARGE_BLOCK_ELEMENTS))


def block(matrix: Matrix, at: Block) -> torch.Tensor:
    """Its values there."""
    if isinstance(matrix, Transpose):
        return block(matrix.matrix, at.transpose).T
    out = torch.empty(at.shape)
    matrix.fill(at, out)
    return out


def whole(matrix: Matrix) -> torch.Tensor:
    """All of it."""
    out = torch.empty(matrix.shape)
    for at in blocks(matrix):
        out[at] = block(matrix, at)
    return out


def square(values: torch.Tensor) -> float:
    """The sum of the squares of a block's values, from float64, which some of them at a time are taken to."""
    rows = values if values.stride(1) == 1 else values.T
    some = torch.split(rows, max(1, _SQUARED_ELEMENTS // rows.shape[1]))
    return math.fsum(float(torch.linalg.vector_norm(piece, dtype=torch.float64)) ** 2 for piece in some)


@dataclass(frozen=True, slots=True)
class Transpose:
    """That of ``matrix``, and in its blocks."""

    matrix: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return columns, rows

    def fill(self, at: Block, out: torch.Tensor) -> None:
        out.copy_(block(self, at))
