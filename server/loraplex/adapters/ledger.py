"""Bytes of adapters that are in one place together: what several of them share is there once, and counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that one adapter takes: its ``own``, and those ``shared``, by content key, with all who have the same."""

    own: int
    shared: Mapping[str, int]

    @staticmethod
    def of(pieces: Iterable[tuple[str, int]]) -> Footprint:
        """Of one adapter's pieces, as (content key, bytes). An empty key is nobody else's; equal ones count once."""
        own = 0
        shared: dict[str, int] = {}
        for key, nbytes in pieces:
            if key:
                shared[key] = nbytes
            else:
                own += nbytes
        return Footprint(own, shared)

    @property
    def nbytes(self) -> int:
        """What it takes alone."""
        return self.own + sum(self.shared.values())


class Ledger:
    """Who is there, in bytes. ``nbytes`` is what all of them take together."""

    def __init__(self, footprints: Iterable[Footprint] = ()) -> None:
        self.nbytes = 0
        self._holders: Counter[str] = Counter()
        for footprint in footprints:
            self.add(footprint)

    def holds(self, key: str) -> bool:
        """Whether anybody who is there shares this content."""
        return key in self._holders

    def cost(self, footprint: Footprint) -> int:
        """Bytes that one more would add."""
        return footprint.own + sum(nbytes for key, nbytes in footprint.shared.items() if key not in self._holders)

    def add(self, footprint: Footprint) -> None:
        """One more is there."""
        self.nbytes += self.cost(footprint)
        self._holders.update(footprint.shared.keys())

    def remove(self, footprint: Footprint) -> None:
        """One that was there is not any more."""
        for key in footprint.shared:
            assert self._holders[key] > 0, f"content {key} has left more often than it came"
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
        self.nbytes -= self.cost(footprint)

    def copy(self) -> Ledger:
        """Another of the same content."""
        other = Ledger()
        other.nbytes, other._holders = self.nbytes, self._holders.copy()
        return other
