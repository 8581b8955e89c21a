"""What a lowered adapter touches, by module name."""

from __future__ import annotations

from collections.abc import Mapping

from loraplex.adapters.delta import SiteDelta
from loraplex.models.sites import Site
from loraplex.types import Coverage


def coverage_of(deltas: Mapping[str, SiteDelta], sites: Mapping[str, Site]) -> Coverage:
    """Per module name, the number of sites, the largest rank, and what is changed there. Both by site name."""
    counts: dict[str, int] = {}
    ranks: dict[str, int] = {}
    changes: dict[str, str] = {}
    for name, delta in deltas.items():
        module = sites[name].module
        counts[module] = counts.get(module, 0) + 1
        ranks[module] = max(ranks.get(module, 0), delta.rank)
        changes.setdefault(module, delta.change())
    return Coverage(counts, ranks, changes)
