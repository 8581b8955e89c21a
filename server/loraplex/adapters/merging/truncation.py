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

    ``values``: the largest, ``[k]`` float64, falling. ``rest``: the sum of the squares of all others. ``low_rank``: of
    the largest components, so many, rounded. ``distance``: of these from the whole change, relative to it, in the
    Frobenius norm.
    """

    values: torch.Tensor
    rest: float
    low_rank: Callable[[int], LowRank]
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


Check = Callable[[LowRank], LowRank]
"""Gives back what it is given, where its values are in the range of its dtype."""


def kept(truncation: Truncation, rank: int, check: Check) -> tuple[LowRank, float]:
    """The largest ``rank`` components, or all there are; and how far they are, rounded, from the whole."""
    low_rank = check(truncation.low_rank(min(rank, len(truncation.values))))
    return low_rank, truncation.distance(low_rank)


def kept_within(truncation: Truncation, max_error: float, check: Check, site: str) -> tuple[LowRank, float]:
    """The fewest components that are, rounded, no farther than ``max_error`` from the whole.

    Raises InvalidRequest: rounding alone takes them farther.
    """
    rank = truncation.within(max_error)
    while True:
        low_rank, error = kept(truncation, rank, check)
        if error <= max_error:
            return low_rank, error
        dtype = low_rank.a.dtype
        del low_rank  # the next one is as large
        # rounding is nearly the same for any rank, and at a right angle to what is left out
        left = max_error**2 - (error**2 - truncation.tail(rank) ** 2)
        if left <= 0 or rank >= len(truncation.values):
            raise refusal(
                "max_error",
                f"{max_error:g} cannot be kept at {site!r}: rounding to {dtype} alone is an error of "
                f"{kept(truncation, len(truncation.values), check)[1]:.2g}",
            )
        rank = max(rank + 1, truncation.within(left**0.5))


def roots_of(values: torch.Tensor) -> torch.Tensor:
    """What each component's factors share of its size, ``values`` ``[r]``: one is multiplied by it, the other, which
    has the whole size, divided. So neither leaves a narrow dtype's range; of rounding alone it is 1."""
    return torch.where(values > values.amax() * _ROUNDING, values.clamp_min(0).sqrt(), 1.0)
