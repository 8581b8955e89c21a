"""What the tables of one model's own rows share: which slots have any, or a merged form, and content but once.

``pack`` may be called from one other thread, that of the adapters' loader; the rest is the engine loop's.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

import torch

from loraplex.layers.rows import PackedRows, Rows, RowsSite, content_key, is_repacked, pack_rows
from loraplex_kernels.lora.slots import SlotBook
from loraplex_kernels.segments import SegmentPlan

Owners = tuple[tuple[slice, int], ...]
"""A step's rows whose adapter has rows of its own at some site, and its slot, in row order."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a plan has of own rows. ``alone``: the slot that all its rows use and nothing else, of an adapter that is
    folded into whole layers: a layer multiplies by what it has for that slot, or by the base's, and has no more to do;
    -1: there is none."""

    plan: SegmentPlan
    owners: Owners
    alone: int


#: plans whose owners are kept: a step's, its head's, and those of the step before
_KEPT_PLANS: Final = 4


@dataclass(eq=False, slots=True, weakref_slot=True)
class MergedForm:
    """What stands for a slot's merged form as long as its content is there: what hangs on it may hang on this object.
    ``num_layers``: that hold a folded matrix for it."""

    num_layers: int = 0


@dataclass(slots=True)
class _Copy:
    """One content on the device, and how many slots of tables hold it."""

    rows: PackedRows
    holders: int = 0


class RowsMemory:
    """One for each model, and one device."""

    def __init__(self, book: SlotBook, device: torch.device) -> None:
        """``book``: the low-rank backend's, where a slot counts as held that holds rows alone."""
        self.device = device
        #: slot -> how many tables hold rows of it; layers only look whether there are any
        self.slots: Counter[int] = Counter()
        self._merged: dict[int, MergedForm] = {}
        self._book = book
        self._packed: WeakValueDictionary[str, PackedRows] = WeakValueDictionary()
        self._copies: dict[str, _Copy] = {}
        self._found: deque[Found] = deque(maxlen=_KEPT_PLANS)

    @property
    def device_bytes(self) -> int:
        """What the copies on a device take; 0 where slots refer to the packed rows themselves."""
        return sum(copy.rows.nbytes for copy in self._copies.values())

    def owners(self, plan: SegmentPlan) -> Owners:
        """The owners among a plan's rows."""
        return self.find(plan).owners

    def find(self, plan: SegmentPlan) -> Found:
        """Looked up once for each plan, whatever the number of layers."""
        for kept in self._found:
            if kept.plan is plan:
                return kept
        owners = tuple(
            (slice(segment.start, segment.stop), term.slot)
            for segment in plan.segments
            for term in segment.terms
            if term.slot in self.slots
        )
        found = Found(plan, owners, self._alone(plan))
        assert found.alone >= 0 or not any(slot in self._merged for _, slot in owners), "a merged form beside others"
        self._found.appendleft(found)
        return found

    def _alone(self, plan: SegmentPlan) -> int:
        if len(plan.segments) != 1 or len(plan.segments[0].terms) != 1:
            return -1
        segment, (term,) = plan.segments[0], plan.segments[0].terms
        whole = segment.stop - segment.start == plan.num_rows and term.weight == 1.0
        return term.slot if whole and term.slot in self._merged else -1

    def merged(self, plan: SegmentPlan) -> MergedForm | None:
        """The merged form that all rows of a plan use; None: they use no one."""
        return self._merged.get(self.find(plan).alone)

    def fold_in(self, slot: int) -> None:
        """A layer holds a folded matrix for ``slot`` now."""
        self._merged.setdefault(slot, MergedForm()).num_layers += 1

    def fold_out(self, slot: int) -> None:
        """A layer holds none for it any more."""
        form = self._merged[slot]
        form.num_layers -= 1
        if not form.num_layers:
            del self._merged[slot]

    def pack(self, rows: Rows, site: RowsSite, key: str = "") -> PackedRows:
        """``rows`` as a table of ``site`` takes them; the very object that another adapter has of equal content, unless
        their ``key`` says that nobody else has any.

        Raises ValueError as ``RowsSite.fit`` does.
        """
        fitted = site.fit(rows)
        if key:
            return pack_rows(fitted, site, key, self.device)
        key = content_key(fitted, site.num_rows, is_repacked(site, self.device))
        packed = self._packed.get(key)
        if packed is None:
            packed = self._packed[key] = pack_rows(fitted, site, key, self.device)
        return packed

    def take(self, slot: int, packed: PackedRows) -> PackedRows:
        """A table begins to hold ``packed`` for ``slot``: what its layer computes with, on the device.

        On a GPU the copy stands in the order of launched work, before every later step. Raises MemoryError, and
        changes nothing, when there is no room.
        """
        held = packed
        if self.device.type != "cpu":
            copy = self._copies.get(packed.key) or _Copy(packed.on(self.device))
            self._copies[packed.key] = copy
            copy.holders += 1
            held = copy.rows
        self.slots[slot] += 1
        self._book.filled(slot)
        self._found.clear()
        return held

    def drop(self, slot: int, held: PackedRows) -> None:
        """A table no longer holds what ``take`` gave it. Launched work may still read it: its memory is given out again
        in the order of that work."""
        copy = self._copies.get(held.key)
        if copy is not None:
            copy.holders -= 1
            if not copy.holders:
                del self._copies[held.key]
        self.slots[slot] -= 1
        if not self.slots[slot]:
            del self.slots[slot]
        self._book.emptied(slot)
        self._found.clear()
