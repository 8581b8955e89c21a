"""The adapter desk as the scheduler sees it."""

from __future__ import annotations

from loraplex.engine.desk import AdapterDesk
from loraplex.engine.sequence import Sequence
from loraplex_kernels.segments import Term


class SequenceSlots:
    """``AdapterSlots`` of a desk."""

    def __init__(self, desk: AdapterDesk) -> None:
        self._desk = desk

    def acquire(self, sequence: Sequence) -> tuple[Term, ...] | None:
        return self._desk.pin(sequence)

    def release(self, sequence: Sequence) -> None:
        self._desk.unpin(sequence)
