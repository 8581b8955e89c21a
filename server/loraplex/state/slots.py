"""Who owns which slot of the state pool: running sequences, states being saved, and the snapshots of the prefix index.

Knows slot and page numbers; knows no tensor. Owned by the scheduler. A slot is *blank*, *held* (a running sequence's
own, or one that a save goes into) or a *snapshot*: it holds the states behind the last token of a page of the prefix
index, for sequences that begin there. Snapshots are idle: they are reused, the one whose last use is oldest first, when
blank slots run out.

Reads and writes of one step have no order among each other, so a snapshot that the step being put together reads is not
given out in that step. Later steps may have its slot: their work stands behind it (``engine/stream.py``).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

#: no slot; as a source: the sequence begins with states of zero (the kernels' ``states.BLANK``)
NO_SLOT: Final = -1


@dataclass(slots=True, eq=False)
class Snapshot:
    """The states behind page ``page``, in ``slot``. ``is_used``: a sequence has begun from it."""

    slot: int
    page: int
    is_used: bool = False


class StateSlots:
    """Slots ``0 .. num_slots-1``."""

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"need at least 1 slot, got {num_slots}")
        self.num_slots = num_slots
        self._blank: deque[int] = deque(range(num_slots))
        self._snapshots: OrderedDict[int, Snapshot] = OrderedDict()  # by page, oldest use first
        self._read: set[int] = set()  # slots of snapshots that the step being put together reads

    @property
    def num_snapshots(self) -> int:
        return len(self._snapshots)

    @property
    def num_held(self) -> int:
        return self.num_slots - len(self._blank) - len(self._snapshots)

    @property
    def num_available(self) -> int:
        """Slots that ``take`` could hand out now."""
        return len(self._blank) + len(self._snapshots) - len(self._read)

    def begin_step(self) -> None:
        """A new step is put together: the one before has its place in the order of work."""
        self._read.clear()

    def take(self) -> int | None:
        """A slot for one owner, with whatever is in it; None when there is none."""
        if self._blank:
            return self._blank.popleft()
        for page, snapshot in self._snapshots.items():
            if snapshot.slot not in self._read:
                del self._snapshots[page]
                return snapshot.slot
        return None

    def give_back(self, slot: int) -> None:
        """What ``take`` or ``begin`` gave is not needed any more."""
        self._blank.append(slot)

    def begin(self, page: int | None) -> tuple[int, int] | None:
        """A slot for a sequence, and the slot that its states are to be read from: the snapshot behind ``page``, which
        has one; ``NO_SLOT`` for None. Where no other is left the snapshot's own slot becomes the sequence's. None:
        there is no slot in this step."""
        if page is None:
            slot = self.take()
            return None if slot is None else (slot, NO_SLOT)
        snapshot = self._snapshots[page]
        others_read_it = snapshot.slot in self._read
        self._read.add(snapshot.slot)
        slot = self.take()
        if slot is not None:
            snapshot.is_used = True
            self._snapshots.move_to_end(page)
            return slot, snapshot.slot
        if others_read_it:
            return None
        self._remove(snapshot)
        return snapshot.slot, snapshot.slot

    def restorable(self, pages: Sequence[int]) -> int:
        """How many of the first of ``pages`` a sequence can go on from: the last of these has a snapshot."""
        return next((count for count in range(len(pages), 0, -1) if pages[count - 1] in self._snapshots), 0)

    def keep(self, slot: int, page: int) -> Snapshot | None:
        """A held slot becomes the snapshot behind ``page``; where there is one already the slot is given back, and
        None returned."""
        if page in self._snapshots:
            self.give_back(slot)
            return None
        snapshot = self._snapshots[page] = Snapshot(slot, page)
        return snapshot

    def reclaim(self, snapshot: Snapshot) -> bool:
        """The slot of a snapshot that is still there, and that nobody has begun from, is held by the caller again.
        False: it is not his any more."""
        if snapshot.is_used or self._snapshots.get(snapshot.page) is not snapshot:
            return False
        self._remove(snapshot)
        return True

    def forget(self, page: int) -> None:
        """``page`` is no longer in the prefix index."""
        snapshot = self._snapshots.get(page)
        if snapshot is not None:
            assert snapshot.slot not in self._read, f"page {page} was evicted while a sequence begins behind it"
            self._remove(snapshot)
            self.give_back(snapshot.slot)

    def _remove(self, snapshot: Snapshot) -> None:
        del self._snapshots[snapshot.page]
        self._read.discard(snapshot.slot)
