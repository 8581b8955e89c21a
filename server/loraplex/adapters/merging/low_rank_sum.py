"""The exact sum of low-rank changes, and its best approximation of a lower rank; the dense matrix is never formed.

The sum ``sum_i c_i B_i A_i`` is ``B A`` with the factors side by side. With ``B = Q_b R_b`` and ``A^T = Q_a R_a`` it is
``Q_b (R_b R_a^T) Q_a^T``: the singular values of the small matrix in the middle are those of the sum, whose singular
vectors are Q times its own. So what is kept of it is what a truncated SVD of the dense matrix keeps (Eckart-Young).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.adapters.delta import LowRank
from loraplex.adapters.merging.part import Part
from loraplex.adapters.merging.truncation import Truncation, balanced

#: rows of factors that are taken to float64 at once
_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class LowRankSum:
    """``B A`` in float32. a: ``[R, in]``, b: ``[out, R]``."""

    a: torch.Tensor
    b: torch.Tensor

    @staticmethod
    def of(parts: Sequence[Part]) -> LowRankSum:
        """The coefficients go into B, as an adapter's scale does when it is laid out to be served."""
        return LowRankSum(
            torch.cat([part.low_rank.a.float() for part in parts]),
            torch.cat([part.low_rank.b.float() * part.coefficient for part in parts], 1),
        )

    @property
    def rank(self) -> int:
        """Of the factors; the sum's own may be lower."""
        return len(self.a)

    def truncation(self) -> Truncation:
        """Its singular value decomposition."""
        q_b, r_b = torch.linalg.qr(self.b)
        q_a, r_a = torch.linalg.qr(self.a.T)
        u, values, vh = torch.linalg.svd(r_b.double() @ r_a.double().T, full_matrices=False)

        def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = values[:rank]
            a = (chosen.unsqueeze(1) * vh[:rank]).float() @ q_a.T
            return balanced(a, q_b @ u[:, :rank].float(), chosen)

        return Truncation(values, 0.0, factors, self.distance)

    def distance(self, other: LowRank) -> float:
        """``||B A - other|| / ||B A||``, from the products of the factors with each other."""
        # what each pair of components adds to the square
        products = _products(self.b, other.b, -other.scale) * _products(self.a.T, other.a.T)
        whole, apart = products[: self.rank, : self.rank].sum(), products.sum()
        return 0.0 if whole <= 0 else float((apart.clamp_min(0) / whole).sqrt())


def _products(ours: torch.Tensor, theirs: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Of all columns of ``ours`` ``[n, R]`` and of ``scale * theirs`` ``[n, r]`` with each other, float64 ``[R + r, R +
    r]``; some rows at a time."""
    rank, width = ours.shape[1], ours.shape[1] + theirs.shape[1]
    products = torch.zeros(width, width, dtype=torch.float64)
    room = products.new_empty(_ROWS, width)
    for mine, other in zip(torch.split(ours, _ROWS), torch.split(theirs, _ROWS), strict=True):
        both = room[: len(mine)]
        both[:, :rank].copy_(mine)
        both[:, rank:].copy_(other).mul_(scale)
        products.addmm_(both.T, both)
    return products
