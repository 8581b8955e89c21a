"""Keeping some of a matrix's singular components: how many, and how far that is from the matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraplex.adapters.delta import LowRank
from loraplex.adapters.merging.options import refusal

#: components smaller than this part of the largest are rounding, and are not divided by
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Truncation:
    """The singular value decomposition of one site's change.

    ``values``: the largest, ``[k]`` float64, falling. ``rest``: the sum of the squares of all others. ``factors``: rank
    -> A ``[r, in]`` and B ``[out, r]`` of the largest components, float32. ``distance``: of the components that are
    kept, rounded, from the whole change, relative to it, in the Frobenius norm.
    """

    values: torch.Tensor
    rest: float
    factors: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    distance: Callable[[LowRank], float]

    def within(self, max_error: float) -> int:
        """The fewest components, one at least, that leave out no more than ``max_error`` of the whole."""
        return int((tails(self.values, self.rest) > max_error).sum()) + 1

    def tail(self, rank: int) -> float:
        """What the largest ``rank`` components leave out, relative to the whole."""
        return float(tails(self.values, self.rest)[rank - 1])


def tails(values: torch.Tensor, rest: float) -> torch.Tensor:
    """What the first 1, 2, ... k components leave out, relative to the whole; as in ``Truncation``."""
    squares = torch.cat((values.square(), values.new_tensor([rest])))
    behind = squares.flip(0).cumsum(0).flip(0)  # [k + 1]: from each component on
    return torch.sqrt(behind[1:] / behind[0].clamp_min(torch.finfo(behind.dtype).tiny))


Rounding = Callable[[torch.Tensor, torch.Tensor], LowRank]
"""A and B in the base's dtype, checked."""


def kept(truncation: Truncation, rank: int, rounding: Rounding) -> tuple[LowRank, float]:
    """The largest ``rank`` components, or all there are; and how far they are, rounded, from the whole."""
    low_rank = rounding(*truncation.factors(min(rank, len(truncation.values))))
    return low_rank, truncation.distance(low_rank)


def kept_within(truncation: Truncation, max_error: float, rounding: Rounding, site: str) -> tuple[LowRank, float]:
    """The fewest components that are, rounded, no farther than ``max_error`` from the whole.

    Raises InvalidRequest: rounding alone takes them farther.
    """
    rank = truncation.within(max_error)
    while True:
        low_rank, error = kept(truncation, rank, rounding)
        if error <= max_error:
            return low_rank, error
        # rounding is nearly the same for any rank, and at a right angle to what is left out
        left = max_error**2 - (error**2 - truncation.tail(rank) ** 2)
        if left <= 0 or rank >= len(truncation.values):
            raise refusal(
                "max_error",
                f"{max_error:g} cannot be kept at {site!r}: rounding to {low_rank.a.dtype} alone is an error of "
                f"{kept(truncation, len(truncation.values), rounding)[1]:.2g}",
            )
        rank = max(rank + 1, truncation.within(left**0.5))


def balanced(a: torch.Tensor, b: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with each component's size, ``values`` ``[r]``, shared by both factors; A's rows have it."""
    # as large in one as in the other, so that neither leaves a narrow dtype's range
    roots = torch.where(values > values.amax() * _ROUNDING, values.clamp_min(0).sqrt(), 1.0).float()
    return a / roots.unsqueeze(1), b * roots
