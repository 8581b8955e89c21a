"""Which rows of a stacked buffer hold which slots. Plain Python; knows no tensors.

The rows of the slots wanted now must lie close together, because one product covers the whole range. Slots that are
not wanted now keep their rows until somebody needs them.
"""

from __future__ import annotations

from collections.abc import Mapping

# The range over the wanted slots may be at most SLACK times their ranks plus SLACK_ROWS before they are laid out anew:
# copying all of them again costs more than multiplying by a few rows too many.
SLACK = 2
SLACK_ROWS = 32


class RowMap:
    """Slot -> rows ``start:stop``. Owner: one stack."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[int, int]] = {}

    def rows(self, slot: int) -> tuple[int, int]:
        """The rows of a placed slot."""
        return self._rows[slot]

    def placed(self) -> Mapping[int, tuple[int, int]]:
        """All slots that have rows, wanted or not."""
        return self._rows

    def forget(self, slot: int) -> None:
        """Drop ``slot``; a no-op when it has no rows."""
        self._rows.pop(slot, None)

    def place(self, ranks: Mapping[int, int]) -> list[int]:
        """Give every slot of ``ranks`` (slot -> rank >= 1) its rows; the slots whose contents must be copied in."""
        new = [slot for slot in ranks if slot not in self._rows]
        for slot in new:
            self._insert(slot, ranks)
        span = max(self._rows[slot][1] for slot in ranks) - min(self._rows[slot][0] for slot in ranks)
        if span > SLACK * sum(ranks.values()) + SLACK_ROWS:
            self._rows.clear()
            new = list(ranks)
            for slot in new:
                self._insert(slot, ranks)
        return new

    def _insert(self, slot: int, ranks: Mapping[int, int]) -> None:
        """First fit among the wanted slots; whatever else lies there loses its rows."""
        start = 0
        for taken_start, taken_stop in sorted(self._rows[other] for other in ranks if other in self._rows):
            if taken_start - start >= ranks[slot]:
                break
            start = taken_stop
        stop = start + ranks[slot]
        overlapped = [other for other, (first, last) in self._rows.items() if first < stop and start < last]
        for other in overlapped:
            del self._rows[other]
        self._rows[slot] = (start, stop)
