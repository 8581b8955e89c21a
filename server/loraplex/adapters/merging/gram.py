"""``D D^T`` of a wide matrix D: little more than its lower half, because half of a square of D's shorter side is what
there is beside the blocks of D."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from loraplex.adapters.merging.matrix import Matrix, block, blocks
from loraplex_kernels.merging import BLOCK_COLUMNS, MergingBackend, Piece, Pieces

#: parts that its rows are cut into: of more there is less above the diagonal, and products are of smaller matrices
_PARTS: Final = 4


@dataclass(frozen=True, slots=True)
class Gram:
    """``lower``: first row of each part -> its rows up to their last diagonal element, ``[rows, end]``; ``pieces`` are
    these and what lies on the other side of the diagonal."""

    lower: Mapping[int, torch.Tensor]
    pieces: Pieces

    @staticmethod
    def of(wide: Matrix, dtype: torch.dtype, backend: MergingBackend) -> Gram:
        """Computed in ``dtype``."""
        size = wide.shape[0]
        step = -(-size // _PARTS)
        ends = {first: min(first + step, size) for first in range(0, size, step)}
        lower = {first: torch.zeros(end - first, end, dtype=dtype) for first, end in ends.items()}
        across = (Piece(rows[:, :first].T, 0, first) for first, rows in lower.items() if first)
        gram = Gram(lower, backend.pieces([*(Piece(rows, first) for first, rows in lower.items()), *across]))
        for at in blocks(wide):
            gram._add(block(wide, at).to(dtype))
        return gram

    @property
    def size(self) -> int:
        return sum(map(len, self.lower.values()))

    @property
    def dtype(self) -> torch.dtype:
        return self.lower[0].dtype

    @property
    def norm(self) -> float:
        """Of D."""
        squares = [rows.diagonal(first).sum(dtype=torch.float64) for first, rows in self.lower.items()]
        return math.sqrt(float(sum(squares)))

    def __matmul__(self, block: torch.Tensor) -> torch.Tensor:
        """Of ``[n, b]``."""
        padded = _whole_registers(block)
        return self.pieces.add_product(padded, torch.empty_like(padded), share=0)[:, : block.shape[1]]

    def enlarged(self, block: torch.Tensor, cut: float, degree: int) -> torch.Tensor:
        """``T_degree(2 / cut * D D^T - 1) block``, of Chebyshev's polynomial; of ``[n, b]`` parts along eigenvectors
        of 0 to ``cut`` become no larger, all others grow. ``degree`` is 1 at least."""
        multiply, before = self.pieces.add_product, _whole_registers(block)
        now = multiply(before, torch.empty_like(before), share=0, of=-1, factor=2 / cut)
        for _ in range(degree - 1):
            before, now = now, multiply(now, before, share=-1, of=-2, factor=4 / cut)
        return now[:, : block.shape[1]]

    def take_out(self, vectors: torch.Tensor, squares: npt.NDArray[np.float64]) -> None:
        """Subtract ``vectors diag(squares) vectors^T``. ``[n, k]``, ``[k]``."""
        weighted = vectors * torch.from_numpy(squares).to(vectors.dtype)
        for first, rows in self.lower.items():
            end = rows.shape[1]
            rows.addmm_(weighted[first:end], vectors[:end].T, alpha=-1)

    def whole(self) -> torch.Tensor:
        """All of it, ``[n, n]``."""
        size = self.size
        whole = torch.empty(size, size, dtype=self.dtype)
        for first, rows in self.lower.items():
            end = rows.shape[1]
            whole[first:end, :end] = rows
            whole[:first, first:end] = rows[:, :first].T
        return whole

    def _add(self, columns: torch.Tensor) -> None:
        """``columns columns^T``."""
        for first, rows in self.lower.items():
            rows.addmm_(columns[first : rows.shape[1]], columns[: rows.shape[1]].T)


def _whole_registers(block: torch.Tensor) -> torch.Tensor:
    """A copy, with columns of zeros behind it."""
    rows, columns = block.shape
    wide = block.new_zeros(rows, -(-columns // BLOCK_COLUMNS) * BLOCK_COLUMNS)
    wide[:, :columns] = block
    return wide
