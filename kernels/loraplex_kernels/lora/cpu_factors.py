"""How the CPU backend stores factors: each slot by itself, in true ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex_kernels.lora import Factors


@dataclass(frozen=True, slots=True)
class Expansion:
    """One part of a slot: ``y[:, column : column+size] += h[rows].T @ b``."""

    rows: slice  # of A x
    column: int  # of y
    b: torch.Tensor  # [r, size], B transposed

    @property
    def rank(self) -> int:
        return int(self.b.shape[0])

    @property
    def size(self) -> int:
        return int(self.b.shape[1])


class SlotFactors:
    """One slot's factors: A of all parts in one tensor, so that x is read once, and B transposed for each part."""

    def __init__(self, parts: tuple[Factors | None, ...], sizes: tuple[int, ...]) -> None:
        self.a = torch.cat([part.a for part in parts if part is not None])  # [sum of ranks, in]
        self.expansions: list[Expansion] = []
        row = column = 0
        for part, size in zip(parts, sizes, strict=True):
            if part is not None:
                rank = part.b.shape[1]
                self.expansions.append(Expansion(slice(row, row + rank), column, part.b.t().contiguous()))
                row += rank
            column += size
        self.nbytes = self.a.nbytes + sum(expansion.b.nbytes for expansion in self.expansions)

    @property
    def multiplications_per_row(self) -> int:
        """What one row of x costs."""
        return self.a.numel() + sum(expansion.b.numel() for expansion in self.expansions)

    def add_(self, y: torch.Tensor, h: torch.Tensor) -> None:
        """``y[n, width] += `` the expansion of ``h`` ``[sum of ranks, n]``, by library calls."""
        for expansion in self.expansions:
            y.narrow(1, expansion.column, expansion.size).addmm_(h[expansion.rows].t(), expansion.b)
