"""Ways to keep factors of many ranks in memory, by what they waste beside the true ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

RANK_CLASSES = (8, 16, 32, 64, 128)
PAGE_RANKS = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks of memory a true rank takes."""

    name: str
    stored_rank: Callable[[int, Sequence[int]], int]
    """(rank, all ranks loaded) -> ranks taken."""
    launches_per_op: Callable[[Sequence[int]], int]
    """Ranks of the batch -> launches that one op needs for them, when a launch knows one size."""


@dataclass(frozen=True, slots=True)
class RankMix:
    """Adapters that are loaded, and in the batch, together."""

    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Waste:
    """One layout under one mix."""

    layout: str
    mix: str
    wasted: float
    """Memory over the true ranks' memory, minus 1."""
    launches_per_op: int


def rank_class(rank: int) -> int:
    """The smallest class that holds ``rank``. Raises ValueError above the largest."""
    for size in RANK_CLASSES:
        if rank <= size:
            return size
    raise ValueError(f"rank {rank} is above the largest class, {RANK_CLASSES[-1]}")


LAYOUTS = (
    Layout("true rank, table of addresses", lambda rank, _: rank, lambda _: 1),
    Layout(
        "rank classes 8/16/32/64/128", lambda rank, _: rank_class(rank), lambda ranks: len(set(map(rank_class, ranks)))
    ),
    Layout(f"pages of {PAGE_RANKS} ranks", lambda rank, _: -(-rank // PAGE_RANKS) * PAGE_RANKS, lambda _: 1),
    Layout("padded to the largest", lambda _, loaded: max(loaded), lambda _: 1),
)
MIXES = (
    RankMix("8, 16, 32, 64", (8, 16, 32, 64)),
    RankMix("eight of 8, one of 64", (*(8,) * 8, 64)),
    RankMix("4, 12, 24, 48", (4, 12, 24, 48)),
    RankMix("every rank 1 to 64", tuple(range(1, 65))),
    RankMix("32 of 16", (16,) * 32),
)


def wastes() -> tuple[Waste, ...]:
    """Every layout under every mix."""
    return tuple(
        Waste(
            layout=layout.name,
            mix=mix.name,
            wasted=sum(layout.stored_rank(rank, mix.ranks) for rank in mix.ranks) / sum(mix.ranks) - 1,
            launches_per_op=layout.launches_per_op(mix.ranks),
        )
        for mix in MIXES
        for layout in LAYOUTS
    )
