"""Where adapters are: laid out on the host always, in device slots within a byte budget while they are in use.

Owned by the engine loop; knows content digests (uids), not names. Uploads go in slices between steps, so that no step
waits for a whole adapter; a slot is usable only when every table of it is written and a fence behind the last write is
done, for a device may still be copying when a write returns. What no running sequence uses and nobody pinned may be
evicted, least recently used first; what is on the host stays, and it returns on use. (On a CPU slots refer to it: an
adapter is in memory once.) Equal content of several adapters (``Write.key``) is kept and counted once, and is there
until the last of them has gone.

A round lasts from one ``advance`` to the next. What ``ensure`` was asked for in the present round is not evicted in
it, so that requests asked for in queue order cannot push out what those before them wait for.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from loraplex.adapters.ledger import Footprint, Ledger
from loraplex.adapters.packed import PackedAdapter, Write
from loraplex.adapters.progress import BankStats, Progress, UploadDone, UploadFailed
from loraplex.errors import InternalError, LoraplexError, OverCapacity
from loraplex.types import Residency
from loraplex_kernels.lora import Fence, Packed

#: when a device that had no room may have some
_RETRY_AFTER_S: Final = 1.0
#: earlier than any round
_NOT_ASKED: Final = -1


@dataclass(eq=False, slots=True)
class _Entry:
    adapter: PackedAdapter
    footprint: Footprint
    slot: int | None = None
    #: tables written so far
    written: int = 0
    #: behind the last write, once all tables are written
    fence: Fence | None = None
    usable: bool = False
    seconds: float = 0.0
    fenced_s: float = 0.0
    users: int = 0
    pinned: bool = False
    last_used: int = 0
    #: in which ``ensure`` was asked for it, and nobody has retained it since
    round: int = _NOT_ASKED

    @property
    def uid(self) -> str:
        return self.adapter.uid


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
        fence: Callable[[], Fence],
        budget_bytes: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``fence``: the tables' backend's; ``budget_bytes``: what all slots together may hold."""
        self._fence = fence
        self._budget = budget_bytes
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._uploads: deque[_Entry] = deque()
        self._landing: list[_Entry] = []  # written, behind a fence that is not done
        self._slots = _Slots()
        self._device = Ledger()
        self._host = Ledger()
        self._shared: dict[str, Packed] = {}  # by key: what every holder of that content refers to
        self._tick = 0
        self._round = 0
        self._evictions = 0
        self._finished = 0
        self._seconds = 0.0

    # ---- content ----

    def add(self, adapter: PackedAdapter) -> None:
        """Keep ``adapter`` on the host, and what is kept of its content already where its uid is there (same uid, same
        content). What is not kept is discarded.

        Raises:
            OverCapacity: it is larger than the whole budget.
        """
        if adapter.uid in self._entries:
            adapter.discard()
            return
        footprint = adapter.footprint
        if footprint.nbytes > self._budget:
            adapter.discard()
            raise OverCapacity(
                f"adapter of {footprint.nbytes} bytes is larger than the adapter memory of {self._budget} bytes "
                f"(--adapter-memory)"
            )
        shared = replace(adapter, writes=tuple(map(self._share, adapter.writes)))
        self._entries[adapter.uid] = _Entry(shared, footprint)
        self._host.add(footprint)

    def remove(self, uid: str) -> None:
        """Forget an adapter, on the device and the host. No sequence may be using it."""
        entry = self._entries[uid]
        assert entry.users == 0, f"adapter {uid} is removed while {entry.users} sequences use it"
        self._vacate(entry)
        del self._entries[uid]
        entry.adapter.discard()
        self._host.remove(entry.footprint)
        for key in entry.footprint.shared:
            if not self._host.holds(key):
                del self._shared[key]

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
            if not self._make_room(absent, kept_since=self._round):
                return None
            for entry in sorted(absent, key=lambda e: uids.index(e.uid)):
                self._begin_upload(entry)
        return self.slots(uids) if all(entry.usable for entry in entries) else None

    def check_fits(self, uids: Sequence[str]) -> None:
        """Raises OverCapacity when these adapters, beside what is pinned, can never be on the device together."""
        self._check_budget({self._entries[uid] for uid in uids})

    def room(self, *, evicting: bool) -> int:
        """Bytes that one more could have on the device: beside what is pinned, or beside all that is there."""
        if not evicting:
            return self._budget - self._device.nbytes
        return self._budget - Ledger(entry.footprint for entry in self._entries.values() if entry.pinned).nbytes

    def prefetch(self, uid: str) -> None:
        """Begin an upload when there is room without evicting anything."""
        entry = self._entries[uid]
        if entry.slot is None and self._device.nbytes + self._device.cost(entry.footprint) <= self._budget:
            self._touch(entry)
            self._begin_upload(entry)

    def squeeze_in(self, uid: str) -> None:
        """Begin an upload now, evicting what may be evicted and, where that is not enough, beyond the budget.

        For a short time and for one adapter at a time: ``keep_to_budget`` takes it off again. Not evicted is what
        ``ensure`` was asked for in the round before and nobody has retained: whoever waits for it asks again after
        this, and else loads that follow each other would push it out again and again.
        """
        entry = self._entries[uid]
        self._touch(entry)
        if entry.slot is None:
            self._make_room([entry], kept_since=self._round - 1)
            self._begin_upload(entry)

    def keep_to_budget(self, uid: str) -> None:
        """Take an adapter that no sequence uses off the device if more is there than the budget allows."""
        entry = self._entries[uid]
        if self._device.nbytes > self._budget and not entry.users:
            self._vacate(entry)

    def slots(self, uids: Iterable[str]) -> tuple[int, ...]:
        """The slots of usable adapters."""
        return tuple(self._slot(uid) for uid in uids)

    def retain(self, uids: Iterable[str]) -> None:
        """A sequence begins to run with these usable adapters: they stay until ``release``."""
        for uid in uids:
            self._slot(uid)
            entry = self._entries[uid]
            entry.users += 1
            entry.round = _NOT_ASKED
            self._touch(entry)

    def release(self, uids: Iterable[str]) -> None:
        """A sequence no longer runs with these adapters."""
        for uid in uids:
            entry = self._entries[uid]
            assert entry.users > 0, f"adapter {uid} is released more often than retained"
            entry.users -= 1
            self._touch(entry)

    def advance(self, budget_s: float) -> Progress:
        """Write tables for about ``budget_s`` seconds, at least one if any is due; see which adapters are there.

        Begins a new round.
        """
        self._round += 1
        started = self._clock()
        failed: list[UploadFailed] = []
        while self._uploads:
            entry = self._uploads[0]
            error = self._write_next(entry)
            if error is not None:
                self._vacate(entry)
                failed.append(UploadFailed(entry.uid, error))
            elif entry.fence is not None:
                self._landing.append(self._uploads.popleft())
            if self._clock() - started >= budget_s:
                break
        return Progress(self._land(), tuple(failed))

    # ---- what is there ----

    @property
    def uploading(self) -> bool:
        """Whether ``advance`` has anything to write, or to see the end of."""
        return bool(self._uploads or self._landing)

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
            device_bytes=self._device.nbytes,
            host_bytes=self._host.nbytes,
            evictions=self._evictions,
            uploads=self._finished,
            upload_s=self._seconds,
            device_uids=on_device,
            host_uids=tuple(self._entries),
        )

    # ---- private ----

    def _share(self, write: Write) -> Write:
        """The write with what is kept already of its content."""
        return replace(write, packed=self._shared.setdefault(write.key, write.packed)) if write.key else write

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
        ledger = Ledger(entry.footprint for entry in pinned)
        kept = ledger.nbytes
        for entry in wanted:
            ledger.add(entry.footprint)
        needed = ledger.nbytes - kept
        if ledger.nbytes > self._budget:
            raise OverCapacity(
                f"{len(wanted)} adapters of {needed} bytes do not fit the adapter memory of {self._budget} bytes "
                f"(--adapter-memory) beside {kept} bytes of pinned adapters",
                field="adapters",
            )

    def _make_room(self, absent: Iterable[_Entry], *, kept_since: int) -> bool:
        """Evict until there is room for ``absent``, nothing that was asked for in the rounds ``kept_since`` on; evict
        nothing when that cannot be."""
        then = self._device.copy()
        for entry in absent:
            then.add(entry.footprint)
        victims: list[_Entry] = []
        for entry in sorted(self._entries.values(), key=lambda e: e.last_used):
            if then.nbytes <= self._budget:
                break
            if entry.usable and not entry.pinned and not entry.users and entry.round < kept_since:
                victims.append(entry)
                then.remove(entry.footprint)
        if then.nbytes > self._budget:
            return False
        for victim in reversed(victims):
            if then.cost(victim.footprint):
                self._vacate(victim)
                self._evictions += 1
            else:  # others that stay hold all of it: nothing would be won
                then.add(victim.footprint)
        return True

    def _begin_upload(self, entry: _Entry) -> None:
        entry.slot = self._slots.take()
        entry.seconds = 0.0
        self._device.add(entry.footprint)
        self._uploads.append(entry)

    def _write_next(self, entry: _Entry) -> LoraplexError | None:
        """Write one table of an upload, and the fence behind the last; the error when the device refuses."""
        assert entry.slot is not None
        write = entry.adapter.writes[entry.written]
        started = self._clock()
        try:
            write.table.write(entry.slot, write.packed)
            entry.written += 1
            if entry.written == len(entry.adapter.writes):
                entry.fence, entry.fenced_s = self._fence(), self._clock()
        except MemoryError as error:
            return OverCapacity(
                f"adapter {entry.uid}: out of memory while writing its slot: {error}", retry_after_s=_RETRY_AFTER_S
            )
        except (RuntimeError, ValueError) as error:  # torch's out-of-memory error is a RuntimeError
            return InternalError(f"adapter {entry.uid}: writing its slot failed: {error}")
        entry.seconds += self._clock() - started
        return None

    def _land(self) -> tuple[UploadDone, ...]:
        """Make usable what is on the device."""
        landed = [entry for entry in self._landing if entry.fence is not None and entry.fence.done()]
        for entry in landed:
            self._landing.remove(entry)
            entry.fence, entry.usable = None, True
            entry.seconds += self._clock() - entry.fenced_s
            self._finished += 1
            self._seconds += entry.seconds
        return tuple(UploadDone(entry.uid, entry.seconds) for entry in landed)

    def _vacate(self, entry: _Entry) -> None:
        """Take an adapter off the device, also in the middle of its upload.

        Whoever gets its slot next is written behind what is still on its way there.
        """
        if entry.slot is None:
            return
        if entry in self._landing:
            self._landing.remove(entry)
        elif not entry.usable:
            self._uploads.remove(entry)
        for write in entry.adapter.writes[: entry.written + 1]:
            write.table.clear(entry.slot)
        self._slots.give(entry.slot)
        self._device.remove(entry.footprint)
        entry.slot, entry.written, entry.fence, entry.usable = None, 0, None, False
