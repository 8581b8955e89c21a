"""Where adapters' tensors are: on the host always, in device slots within a byte budget while they are in use.

Owned by the engine loop; knows content digests (uids), not names. Uploads go in slices between steps, so that no step
waits for a whole adapter; a slot is usable only when every table of it is written. What no running sequence uses and
nobody pinned may be evicted, least recently used first; its host copy stays, and it returns on use.

A round lasts from one ``advance`` to the next. What ``ensure`` was asked for in the present round is not evicted in
it, so that requests asked for in queue order cannot push out what those before them wait for.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loraplex.adapters.delta import AdapterDelta, SiteDelta
from loraplex.errors import InternalError, LoraplexError, OverCapacity
from loraplex.models.base import TableRef
from loraplex.types import Residency
from loraplex_kernels.lora import Factors, LoraTable


@dataclass(frozen=True, slots=True)
class UploadDone:
    """An adapter became usable; ``seconds`` is the time spent writing it."""

    uid: str
    seconds: float


@dataclass(frozen=True, slots=True)
class UploadFailed:
    """An adapter could not be written; it is on the host alone again."""

    uid: str
    error: LoraplexError


@dataclass(frozen=True, slots=True)
class Progress:
    """What one ``advance`` brought to an end."""

    done: tuple[UploadDone, ...] = ()
    failed: tuple[UploadFailed, ...] = ()


@dataclass(frozen=True, slots=True)
class BankStats:
    """Gauges, and totals since the start. Bytes on the device are those of true ranks."""

    device_bytes: int
    host_bytes: int
    evictions: int
    uploads: int
    upload_s: float
    device_uids: tuple[str, ...]
    host_uids: tuple[str, ...]


#: a table of the adapter, and its factors there, one per part
_Write = tuple[LoraTable, tuple[SiteDelta | None, ...]]


@dataclass(eq=False, slots=True)
class _Entry:
    uid: str
    nbytes: int
    writes: tuple[_Write, ...]
    slot: int | None = None
    #: tables written so far; the slot is usable when all are
    written: int = 0
    seconds: float = 0.0
    users: int = 0
    pinned: bool = False
    last_used: int = 0
    round: int = -1

    @property
    def usable(self) -> bool:
        return self.slot is not None and self.written == len(self.writes)


@dataclass(slots=True)
class _Slots:
    """Small slot numbers first, so that tables stay small."""

    free: list[int] = field(default_factory=list)
    next: int = 0

    def take(self) -> int:
        if self.free:
            return heapq.heappop(self.free)
        self.next += 1
        return self.next - 1

    def give(self, slot: int) -> None:
        heapq.heappush(self.free, slot)


class AdapterBank:
    """Host copies, device slots, uploads and evictions. Owner: the engine loop."""

    def __init__(
        self,
        tables: Mapping[str, TableRef],
        budget_bytes: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``tables``: site name -> where its factors go; ``budget_bytes``: what all slots together may hold."""
        self._tables = tables
        self._budget = budget_bytes
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._uploads: deque[_Entry] = deque()
        self._slots = _Slots()
        self._used = 0
        self._host = 0
        self._tick = 0
        self._round = 0
        self._evictions = 0
        self._finished = 0
        self._seconds = 0.0

    # ---- content ----

    def add(self, delta: AdapterDelta) -> None:
        """Keep ``delta`` on the host; nothing happens when its uid is there already (same uid, same content).

        Raises:
            OverCapacity: it is larger than the whole budget.
        """
        if delta.uid in self._entries:
            return
        if delta.nbytes > self._budget:
            raise OverCapacity(
                f"adapter of {delta.nbytes} bytes is larger than the adapter memory of {self._budget} bytes "
                f"(--adapter-memory)"
            )
        self._entries[delta.uid] = _Entry(delta.uid, delta.nbytes, self._writes(delta.sites))
        self._host += delta.nbytes

    def remove(self, uid: str) -> None:
        """Forget an adapter, on the device and the host. No sequence may be using it."""
        entry = self._entries[uid]
        assert entry.users == 0, f"adapter {uid} is removed while {entry.users} sequences use it"
        self._vacate(entry)
        del self._entries[uid]
        self._host -= entry.nbytes

    def set_pinned(self, uid: str, pinned: bool) -> None:
        """Keep an adapter on the device once it is there, or no longer.

        Raises:
            OverCapacity: all pinned adapters together would not fit the budget.
        """
        entry = self._entries[uid]
        if pinned and not entry.pinned:
            self._check_budget({entry})
        entry.pinned = pinned

    # ---- use ----

    def ensure(self, uids: Sequence[str]) -> tuple[int, ...] | None:
        """The slots of all of one request's adapters, or None while some are not usable yet.

        Begins uploads for those that are not on the device when all of them fit, evicting what may be evicted; begins
        none otherwise. Ask again after ``advance``, in queue order.

        Raises:
            OverCapacity: they, and what is pinned, do not fit the budget together: they never will.
        """
        entries = {self._entries[uid] for uid in uids}
        self._check_budget(entries)
        for entry in entries:
            entry.round = self._round
            self._touch(entry)
        absent = [entry for entry in entries if entry.slot is None]
        if absent:
            if not self._make_room(sum(entry.nbytes for entry in absent)):
                return None
            for entry in sorted(absent, key=lambda e: uids.index(e.uid)):
                self._begin_upload(entry)
        return self.slots(uids) if all(entry.usable for entry in entries) else None

    def check_fits(self, uids: Sequence[str]) -> None:
        """Raises OverCapacity when these adapters, beside what is pinned, can never be on the device together."""
        self._check_budget({self._entries[uid] for uid in uids})

    def prefetch(self, uid: str) -> None:
        """Begin an upload when there is room without evicting anything."""
        entry = self._entries[uid]
        if entry.slot is None and self._used + entry.nbytes <= self._budget:
            self._touch(entry)
            self._begin_upload(entry)

    def slots(self, uids: Iterable[str]) -> tuple[int, ...]:
        """The slots of usable adapters."""
        return tuple(self._slot(uid) for uid in uids)

    def retain(self, uids: Iterable[str]) -> None:
        """A sequence begins to run with these usable adapters: they stay until ``release``."""
        for uid in uids:
            self._slot(uid)
            entry = self._entries[uid]
            entry.users += 1
            self._touch(entry)

    def release(self, uids: Iterable[str]) -> None:
        """A sequence no longer runs with these adapters."""
        for uid in uids:
            entry = self._entries[uid]
            assert entry.users > 0, f"adapter {uid} is released more often than retained"
            entry.users -= 1
            self._touch(entry)

    def advance(self, budget_s: float) -> Progress:
        """Write tables for about ``budget_s`` seconds, at least one if any is due, and begin a new round."""
        self._round += 1
        started = self._clock()
        done: list[UploadDone] = []
        failed: list[UploadFailed] = []
        while self._uploads:
            entry = self._uploads[0]
            error = self._write_next(entry)
            if error is not None:
                self._vacate(entry)
                failed.append(UploadFailed(entry.uid, error))
            elif entry.usable:
                self._uploads.popleft()
                self._finished += 1
                self._seconds += entry.seconds
                done.append(UploadDone(entry.uid, entry.seconds))
            if self._clock() - started >= budget_s:
                break
        return Progress(tuple(done), tuple(failed))

    # ---- what is there ----

    @property
    def uploading(self) -> bool:
        """Whether ``advance`` has anything to write."""
        return bool(self._uploads)

    def holds(self, uid: str) -> bool:
        """Whether this content is known here."""
        return uid in self._entries

    def is_uploading(self, uid: str) -> bool:
        """Whether an upload of this content has begun and not ended."""
        entry = self._entries[uid]
        return entry.slot is not None and not entry.usable

    def residency(self, uid: str) -> Residency:
        """The fastest place an adapter can be used from; DISK for one that is unknown here."""
        entry = self._entries.get(uid)
        if entry is None:
            return Residency.DISK
        return Residency.DEVICE if entry.usable else Residency.HOST

    def stats(self) -> BankStats:
        """Gauges and totals."""
        on_device = tuple(uid for uid, entry in self._entries.items() if entry.usable)
        return BankStats(
            device_bytes=self._used,
            host_bytes=self._host,
            evictions=self._evictions,
            uploads=self._finished,
            upload_s=self._seconds,
            device_uids=on_device,
            host_uids=tuple(self._entries),
        )

    # ---- private ----

    def _writes(self, sites: Mapping[str, SiteDelta]) -> tuple[_Write, ...]:
        """Per table, all parts at once: sites packed into one layer are written by one call."""
        by_table: dict[int, tuple[LoraTable, list[SiteDelta | None]]] = {}
        for site, delta in sites.items():
            ref = self._tables[site]
            empty: list[SiteDelta | None] = [None] * len(ref.table.part_sizes)
            by_table.setdefault(id(ref.table), (ref.table, empty))[1][ref.part] = delta
        return tuple((table, tuple(parts)) for table, parts in by_table.values())

    def _slot(self, uid: str) -> int:
        entry = self._entries[uid]
        assert entry.slot is not None, f"adapter {uid} is used while it is not on the device"
        assert entry.usable, f"adapter {uid} is used before its upload is complete"
        return entry.slot

    def _touch(self, entry: _Entry) -> None:
        self._tick += 1
        entry.last_used = self._tick

    def _check_budget(self, wanted: set[_Entry]) -> None:
        pinned = {entry for entry in self._entries.values() if entry.pinned} - wanted
        needed = sum(entry.nbytes for entry in wanted)
        kept = sum(entry.nbytes for entry in pinned)
        if needed + kept > self._budget:
            raise OverCapacity(
                f"{len(wanted)} adapters of {needed} bytes do not fit the adapter memory of {self._budget} bytes "
                f"(--adapter-memory) beside {kept} bytes of pinned adapters",
                field="adapters",
            )

    def _make_room(self, nbytes: int) -> bool:
        """Evict until ``nbytes`` are free; evict nothing when that cannot be."""
        missing = self._used + nbytes - self._budget
        victims: list[_Entry] = []
        for entry in sorted(self._entries.values(), key=lambda e: e.last_used):
            if missing <= 0:
                break
            if entry.usable and not entry.pinned and not entry.users and entry.round != self._round:
                victims.append(entry)
                missing -= entry.nbytes
        if missing > 0:
            return False
        for victim in victims:
            self._vacate(victim)
            self._evictions += 1
        return True

    def _begin_upload(self, entry: _Entry) -> None:
        entry.slot = self._slots.take()
        entry.written = 0
        entry.seconds = 0.0
        self._used += entry.nbytes
        self._uploads.append(entry)

    def _write_next(self, entry: _Entry) -> LoraplexError | None:
        """Write one table of an upload; the error when the device refuses."""
        assert entry.slot is not None
        table, parts = entry.writes[entry.written]
        started = self._clock()
        try:
            table.write(entry.slot, [None if part is None else Factors(part.a, part.scaled_b()) for part in parts])
        except MemoryError as error:
            return OverCapacity(f"adapter {entry.uid}: out of memory while writing its slot: {error}")
        except (RuntimeError, ValueError) as error:  # torch's out-of-memory error is a RuntimeError
            return InternalError(f"adapter {entry.uid}: writing its slot failed: {error}")
        entry.written += 1
        entry.seconds += self._clock() - started
        return None

    def _vacate(self, entry: _Entry) -> None:
        """Take an adapter off the device, also in the middle of its upload."""
        if entry.slot is None:
            return
        if not entry.usable:
            self._uploads.remove(entry)
        for table, _ in entry.writes[: entry.written + 1]:
            table.clear(entry.slot)
        self._slots.give(entry.slot)
        self._used -= entry.nbytes
        entry.slot, entry.written = None, 0
