"""Matrices that are never whole: whatever is done to a site's dense change is done to one block of it after another.

A block is computed when it is looked at, and forgotten after that: a dense change takes no memory, of whatever size it
is, and what is done to one block stays in the processor's cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import torch

from loraplex.adapters.delta import LowRank

#: elements of a block, about: as many as have work for longer than two threads take to hand Python to each other
_BLOCK_ELEMENTS: Final = 1 << 18
#: elements of a matrix that takes little memory
_SMALL: Final = 1 << 21
#: a block's rows, or columns, are a multiple of it: products are faster, and bits are whole bytes
_STEP: Final = 32


class Block(NamedTuple):
    """Where a block lies."""

    rows: slice
    columns: slice

    @property
    def transpose(self) -> Block:
        return Block(self.columns, self.rows)


class Matrix(Protocol):
    """Of float32 ``[rows, columns]``."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def block(self, at: Block) -> torch.Tensor:
        """Its values there, which are not to be changed; of each of its ``blocks`` the same every time, to the bit."""
        ...


def blocks(matrix: Matrix) -> list[Block]:
    """What it is cut into: along its longer side, each with all of the shorter one."""
    rows, columns = matrix.shape
    step = max(1, _BLOCK_ELEMENTS // min(rows, columns) // _STEP) * _STEP
    cuts = [slice(at, min(at + step, max(rows, columns))) for at in range(0, max(rows, columns), step)]
    return [Block(cut, slice(0, columns)) if rows > columns else Block(slice(0, rows), cut) for cut in cuts]


def whole(matrix: Matrix) -> torch.Tensor:
    """All of it."""
    out = torch.empty(matrix.shape)
    for at in blocks(matrix):
        out[at] = matrix.block(at)
    return out


def square(block: torch.Tensor) -> float:
    """The sum of its values' squares, from float64."""
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor that is there."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.tensor.shape
        return rows, columns

    def block(self, at: Block) -> torch.Tensor:
        return self.tensor[at].float()


@dataclass(frozen=True, slots=True)
class Product:
    """``scale * left right``. left: ``[rows, r]``, right: ``[r, columns]``, float32."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    @staticmethod
    def of(low_rank: LowRank) -> Product:
        """A dense change ``[out, in]``."""
        left, right, scale = low_rank.b.float(), low_rank.a.float(), low_rank.scale
        if math.frexp(scale)[0] == 0.5:  # a power of two rounds nothing: it may as well come first
            left, scale = left * scale, 1.0
        return Product(left, right, scale)

    @property
    def transpose(self) -> Product:
        return Product(self.right.T, self.left.T, self.scale)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.left), self.right.shape[1]

    def block(self, at: Block) -> torch.Tensor:
        product = self.left[at.rows] @ self.right[:, at.columns]
        return product if self.scale == 1 else product.mul_(self.scale)


@dataclass(frozen=True, slots=True)
class Transpose:
    """That of ``matrix``."""

    matrix: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return columns, rows

    def block(self, at: Block) -> torch.Tensor:
        return self.matrix.block(at.transpose).T


@dataclass(frozen=True, slots=True)
class Changed:
    """One of the same shape, whose blocks are made of those of ``matrix``."""

    matrix: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape


def remembered(matrix: Matrix) -> Matrix:
    """``matrix``, each of whose ``blocks`` is computed once and stays there; if it is small."""
    rows, columns = matrix.shape
    return _Remembered(matrix) if rows * columns <= _SMALL else matrix


@dataclass(frozen=True, slots=True)
class _Remembered(Changed):
    """As ``remembered``."""

    _computed: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def block(self, at: Block) -> torch.Tensor:
        key = at.rows.start, at.columns.start
        if key not in self._computed:
            self._computed[key] = self.matrix.block(at)
        return self._computed[key]
