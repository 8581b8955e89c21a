"""The bank under any order of use: within its budget, nothing usable before it is whole, nothing left behind."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loraplex.errors import OverCapacity
from tests.fakes_adapters import SITE_BYTES, BankRoom, SlowFences


class Traffic(RuleBasedStateMachine):
    """Adapters of several sizes, some of equal content, used, released, removed, pinned and squeezed in, in any order
    under a small budget."""

    sizes = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 3}  # noqa: RUF012
    shared = {"b": {"x": 2}, "c": {"x": 2, "y": 1}, "e": {"y": 1}}  # noqa: RUF012
    budget = 6
    names = st.sampled_from(sorted(sizes))

    def __init__(self) -> None:
        super().__init__()
        self.fences = SlowFences()
        self.room = BankRoom(self.budget, self.fences)
        self.bank = self.room.bank
        self.added: set[str] = set()
        self.pinned: set[str] = set()
        self.running: list[tuple[str, ...]] = []
        self.squeezed: str | None = None

    def bytes_of(self, uids: Iterable[str]) -> int:
        """What they take together."""
        own = sum(self.sizes[uid] for uid in uids)
        content = {key: size for uid in uids for key, size in self.shared.get(uid, {}).items()}
        return (own + sum(content.values())) * SITE_BYTES

    @rule(uid=names)
    def add(self, uid: str) -> None:
        sites = [site for site in self.room.refs if site.endswith(("q_proj", "o_proj"))][: self.sizes[uid]]
        self.room.add_sharing(uid, sites, self.shared.get(uid, {}))
        self.added.add(uid)

    @rule(uids=st.sets(names, min_size=1, max_size=2))
    def run(self, uids: set[str]) -> None:
        wanted = tuple(sorted(uids & self.added))
        if not wanted:
            return
        before = set(self.bank.stats().device_uids)
        try:
            slots = self.bank.ensure(wanted)
        except OverCapacity:
            assert self.bytes_of({*wanted, *self.pinned}) > self.budget * SITE_BYTES
            return
        if slots is not None:
            assert set(wanted) <= before
            assert len(set(slots)) == len(slots)
            self.bank.retain(wanted)
            self.running.append(wanted)

    @rule(count=st.integers(0, 2))
    def copies_arrive(self, count: int) -> None:
        self.fences.pass_some(count)

    @rule()
    def advance(self) -> None:
        self.bank.advance(0.0)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.running:
            self.bank.release(self.running.pop(data.draw(st.integers(0, len(self.running) - 1))))

    @rule(uid=names, pinned=st.booleans())
    def pin(self, uid: str, pinned: bool) -> None:
        if uid not in self.added:
            return
        try:
            self.bank.set_pinned(uid, pinned)
        except OverCapacity:
            assert self.bytes_of(self.pinned | {uid}) > self.budget * SITE_BYTES
            return
        (self.pinned.add if pinned else self.pinned.discard)(uid)

    @rule(uid=names)
    def squeeze_in(self, uid: str) -> None:
        if uid in self.added and self.squeezed is None:
            self.squeezed = uid
            self.bank.squeeze_in(uid)

    @rule()
    def keep_to_budget(self) -> None:
        if self.squeezed is not None and not any(self.squeezed in uids for uids in self.running):
            self.bank.keep_to_budget(self.squeezed)
            self.squeezed = None

    @rule(uid=names)
    def remove(self, uid: str) -> None:
        if uid in self.added and not any(uid in uids for uids in self.running):
            self.bank.remove(uid)
            self.added.discard(uid)
            self.pinned.discard(uid)
            self.squeezed = None if self.squeezed == uid else self.squeezed

    @invariant()
    def tables_hold_what_is_resident(self) -> None:
        stats = self.bank.stats()
        on_device = {uid for uid in self.added if uid in stats.device_uids or self.bank.is_uploading(uid)}
        assert stats.device_bytes == self.bytes_of(on_device)
        assert stats.device_bytes <= self.budget * SITE_BYTES or self.squeezed in on_device
        assert stats.host_bytes == self.bytes_of(self.added)
        assert {uid for uids in self.running for uid in uids} <= set(stats.device_uids)
        slots = self.bank.slots(stats.device_uids)
        assert len(set(slots)) == len(slots)
        for uid, slot in zip(stats.device_uids, slots, strict=True):
            assert sum(slot in table.rows for table in self.room.tables) == self.sizes[uid]
            assert all(slot in self.room.shared_tables[key].rows for key in self.shared.get(uid, {}))
        for table in self.room.shared_tables.values():
            assert len({id(delta) for delta in table.rows.values()}) <= 1, "equal content, one memory"
        if not self.bank.uploading:
            assert {slot for table in self.room.tables for slot in table.rows} == set(slots)

    def teardown(self) -> None:
        for uids in self.running:
            self.bank.release(uids)
        for uid in sorted(self.added):
            self.bank.remove(uid)
        stats = self.bank.stats()
        assert (stats.device_bytes, stats.host_bytes) == (0, 0)
        assert all(not table.rows for table in (*self.room.tables, *self.room.shared_tables.values()))
        assert not self.bank.uploading


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
