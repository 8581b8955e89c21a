"""``D D^T`` of a wide matrix D: little more than its lower half, because half of a square of D's shorter side is what
there is beside the blocks of D."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.adapters.merging.matrix import Matrix, block, blocks

#: parts that its rows are cut into: of more there is less above the diagonal, and products are of smaller matrices
_PARTS: Final = 4


@dataclass(frozen=True, slots=True)
class Gram:
    """``lower``: first row of each part -> its rows up to their last diagonal element, ``[rows, end]``."""

    lower: Mapping[int, torch.Tensor]

    @staticmethod
    def of(wide: Matrix, dtype: torch.dtype) -> Gram:
        """Computed in ``dtype``."""
        size = wide.shape[0]
        step = -(-size // _PARTS)
        ends = {first: min(first + step, size) for first in range(0, size, step)}
        gram = Gram({first: torch.zeros(end - first, end, dtype=dtype) for first, end in ends.items()})
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
        product = block.new_empty(block.shape)
        for first, rows in self.lower.items():
            end = rows.shape[1]
            torch.mm(rows, block[:end], out=product[first:end])
            if first:  # what lies on the other side of the diagonal, for those that are there
                product[:first].addmm_(rows[:, :first].T, block[first:end])
        return product

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
