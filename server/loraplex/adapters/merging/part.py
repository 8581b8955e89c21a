"""What one input brings to a site."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.adapters.delta import LowRank


@dataclass(frozen=True, slots=True)
class Part:
    """One input's low-rank change of a site, and the input's weight."""

    low_rank: LowRank
    weight: float

    @property
    def coefficient(self) -> float:
        """What ``B A`` is multiplied by."""
        return self.weight * self.low_rank.scale
