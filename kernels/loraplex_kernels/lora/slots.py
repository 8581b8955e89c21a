"""Which slots a backend's tables hold anything for: what ``prepare`` checks a plan against."""

from __future__ import annotations

from collections import Counter

from loraplex_kernels.segments import SegmentPlan


class SlotBook:
    """Slot -> how many tables hold something for it. Owned by a backend, kept by its tables."""

    def __init__(self) -> None:
        self._tables: Counter[int] = Counter()

    def __len__(self) -> int:
        """Slots that hold anything."""
        return len(self._tables)

    def filled(self, slot: int) -> None:
        """A table that held nothing for ``slot`` does now."""
        self._tables[slot] += 1

    def emptied(self, slot: int) -> None:
        """A table holds nothing for ``slot`` any more."""
        self._tables[slot] -= 1
        if not self._tables[slot]:
            del self._tables[slot]

    def check(self, plan: SegmentPlan) -> None:
        """Raises ValueError naming a slot of ``plan`` that holds nothing in any table, and its rows."""
        for segment in plan.segments:
            for term in segment.terms:
                if term.slot not in self._tables:
                    raise ValueError(
                        f"rows {segment.start}:{segment.stop} of the step name slot {term.slot}, which holds nothing "
                        f"in any table; {len(self._tables)} slots do"
                    )
