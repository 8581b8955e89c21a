"""The bank: slots, slices, budget, eviction; nothing usable before it is whole, nothing left behind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.adapters.ledger import Footprint
from loraplex.adapters.packed import pack_adapter
from loraplex.errors import InternalError, InvalidAdapter, OverCapacity
from loraplex.types import Residency
from tests.fakes_adapters import ONE_SITE, SITE_BYTES, BankRoom, SlowFences, fake_delta, fake_tables


def run_until_usable(bank: AdapterBank, *uids: str) -> tuple[int, ...]:
    for _ in range(100):
        slots = bank.ensure(uids)
        if slots is not None:
            return slots
        bank.advance(0.0)
    raise AssertionError(f"{uids} never became usable")


def test_packed_parts_are_written_by_one_call_with_the_scale_in_b() -> None:
    room = BankRoom()
    room.add("u", ["model.layers.0.q_proj", "model.layers.0.v_proj"], rank=2, scale=3.0)
    (slot,) = run_until_usable(room.bank, "u")
    query, key, value = room.tables[0].rows[slot].parts
    assert key is None
    assert query is not None
    assert query.factors is not None
    assert value is not None
    assert value.factors is not None
    assert torch.equal(query.factors.b, torch.full((8, 2), 3.0))
    assert torch.equal(value.factors.a, torch.ones(2, 8))
    assert room.tables[1].rows == {}


def test_an_upload_goes_in_slices_and_is_usable_only_when_whole() -> None:
    room = BankRoom()
    bank = room.bank
    room.add("u", room.refs)
    assert bank.residency("u") is Residency.HOST
    assert bank.ensure(["u"]) is None
    done = []
    for written in range(1, 2 * BankRoom.LAYERS + 1):
        done += bank.advance(0.0).done
        assert room.num_written() == written
        usable = written == 2 * BankRoom.LAYERS
        assert (bank.ensure(["u"]) is not None) is usable
        assert bank.residency("u") is (Residency.DEVICE if usable else Residency.HOST)
        assert bank.uploading is not usable
    assert [upload.uid for upload in done] == ["u"]
    assert done[0].seconds >= 2 * BankRoom.LAYERS, "each write takes a second of this clock"
    assert bank.stats().upload_s == done[0].seconds
    assert bank.stats().uploads == 1
    room.add("v", room.refs)
    assert bank.ensure(["v"]) is None
    assert len(bank.advance(1e9).done) == 1


def test_least_recently_used_goes_first_and_returns_on_use() -> None:
    room = BankRoom(2)
    bank = room.bank
    for uid in "abc":
        room.add(uid)
    run_until_usable(bank, "a")
    run_until_usable(bank, "b")
    run_until_usable(bank, "a")
    bank.advance(0)
    run_until_usable(bank, "c")
    assert set(bank.stats().device_uids) == {"a", "c"}
    assert bank.stats().evictions == 1
    assert bank.residency("b") is Residency.HOST
    bank.advance(0)
    run_until_usable(bank, "b")
    assert set(bank.stats().device_uids) == {"b", "c"}


def test_slots_that_were_given_back_are_used_again() -> None:
    room = BankRoom(1)
    bank = room.bank
    for uid in "abcd":
        room.add(uid)
        assert run_until_usable(bank, uid) == (0,)
        bank.advance(0)


def test_what_runs_or_is_pinned_stays() -> None:
    room = BankRoom(2)
    bank = room.bank
    for uid in "abc":
        room.add(uid)
    run_until_usable(bank, "a")
    run_until_usable(bank, "b")
    bank.retain(["a"])
    bank.set_pinned("b", True)
    bank.advance(0)
    assert bank.ensure(["c"]) is None
    assert not bank.uploading
    bank.set_pinned("b", False)
    run_until_usable(bank, "c")
    assert set(bank.stats().device_uids) == {"a", "c"}
    bank.release(["a"])
    bank.advance(0)
    run_until_usable(bank, "b", "c")


def test_those_behind_in_the_queue_cannot_push_out_what_is_waited_for() -> None:
    room = BankRoom(2)
    bank = room.bank
    for uid in "abc":
        room.add(uid)
    run_until_usable(bank, "a")
    bank.advance(0)
    assert bank.ensure(["a", "b"]) is None
    assert bank.ensure(["c"]) is None
    bank.advance(0)
    assert bank.ensure(["a", "b"]) is not None


def test_over_capacity_is_said_at_once() -> None:
    room = BankRoom(3)
    bank = room.bank
    with pytest.raises(OverCapacity, match=r"adapter of 256 bytes is larger than the adapter memory of 192 bytes"):
        room.add("huge", rank=4)
    assert bank.residency("huge") is Residency.DISK
    room.add("a", rank=2)
    room.add("b", rank=2)
    with pytest.raises(OverCapacity, match="2 adapters of 256 bytes do not fit the adapter memory of 192 bytes"):
        bank.ensure(["a", "b"])
    bank.set_pinned("a", True)
    with pytest.raises(OverCapacity, match="beside 128 bytes of pinned"):
        bank.ensure(["b"])
    with pytest.raises(OverCapacity):
        bank.set_pinned("b", True)
    assert run_until_usable(bank, "a") == (0,)
    assert bank.ensure(["a", "a"]) == (0, 0)


def test_prefetch_takes_free_room_only() -> None:
    room = BankRoom(1)
    bank = room.bank
    room.add("a")
    room.add("b")
    bank.prefetch("a")
    bank.advance(0)
    assert bank.residency("a") is Residency.DEVICE
    bank.prefetch("b")
    assert not bank.uploading


def test_removal_in_the_middle_of_an_upload_leaves_nothing() -> None:
    room = BankRoom()
    bank = room.bank
    room.add("u", room.refs)
    bank.ensure(["u"])
    bank.advance(0)
    bank.advance(0)
    bank.remove("u")
    assert room.num_written() == 0
    assert not bank.uploading
    assert (bank.stats().device_bytes, bank.stats().host_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("refusal", "error"), [(RuntimeError("CUDA out of memory"), InternalError), (MemoryError("no"), OverCapacity)]
)
def test_a_device_that_refuses_fails_that_upload_alone(refusal: Exception, error: type[Exception]) -> None:
    room = BankRoom()
    bank = room.bank
    room.add("bad", room.refs)
    room.add("good")
    room.tables[3].refusal = refusal
    bank.ensure(["bad"])
    bank.ensure(["good"])
    progress = bank.advance(1e9)
    assert [upload.uid for upload in progress.done] == ["good"]
    assert [(upload.uid, type(upload.error)) for upload in progress.failed] == [("bad", error)]
    assert "bad" in str(progress.failed[0].error)
    assert room.num_written() == 1
    assert bank.stats().device_uids == ("good",)


def test_one_content_is_kept_once() -> None:
    room = BankRoom(4)
    bank = room.bank
    room.add("a")
    room.add("a")
    assert bank.stats().host_bytes == SITE_BYTES


def test_what_no_table_can_take_is_refused_by_its_sites() -> None:
    tables, refs = fake_tables(1)
    sites = ["model.layers.0.q_proj", "model.layers.0.v_proj"]
    good = fake_delta("u", sites)
    broken = {**good.sites, sites[1]: SiteDelta(LowRank(torch.full((1, 8), float("inf")), torch.ones(8, 1), 1.0))}
    with pytest.raises(
        InvalidAdapter, match=r"q_proj' \(part 0\), 'model.layers.0.v_proj' \(part 2\): part 2: A holds"
    ):
        pack_adapter(replace(good, sites=broken), refs)
    with pytest.raises(InvalidAdapter, match=r"o_proj' \(part 0\): part 0: A is \[1, 9\]"):
        pack_adapter(fake_delta("u", ["model.layers.0.o_proj"], hidden=9), refs)
    assert all(not table.rows for table in tables)


def test_equal_content_is_kept_once_until_its_last_holder_goes() -> None:
    room = BankRoom(5)
    bank = room.bank
    room.add_sharing("a", ONE_SITE, {"head": 3})
    room.add_sharing("b", ONE_SITE, {"head": 3})
    assert bank.stats().host_bytes == 5 * SITE_BYTES
    run_until_usable(bank, "a")
    assert bank.stats().device_bytes == 4 * SITE_BYTES
    first, second = run_until_usable(bank, "a", "b")
    assert bank.stats().device_bytes == 5 * SITE_BYTES
    head = room.shared_tables["head"].rows
    assert head[first] is head[second], "one piece of memory"
    bank.remove("a")
    assert (bank.stats().device_bytes, bank.stats().host_bytes) == (4 * SITE_BYTES, 4 * SITE_BYTES)
    assert set(head) == {second}
    bank.remove("b")
    assert (bank.stats().device_bytes, bank.stats().host_bytes) == (0, 0)


def test_content_that_an_adapter_has_twice_counts_once() -> None:
    footprint = Footprint.of([("", 5), ("", 5), ("norm", 7), ("norm", 7)])
    assert (footprint.own, footprint.shared, footprint.nbytes) == (10, {"norm": 7}, 17)


def test_what_would_free_nothing_is_not_evicted() -> None:
    room = BankRoom(5)
    bank = room.bank
    room.add_sharing("old", (), {"head": 3})
    room.add_sharing("user", (), {"head": 3})
    room.add("idle")
    room.add("new", rank=2)
    for uid in ("old", "user", "idle"):
        run_until_usable(bank, uid)
    bank.retain(["user"])
    bank.advance(0)
    run_until_usable(bank, "new")
    assert set(bank.stats().device_uids) == {"old", "user", "new"}
    assert bank.stats().evictions == 1


def test_sharing_makes_a_set_fit_that_would_not_otherwise() -> None:
    room = BankRoom(4)
    bank = room.bank
    room.add_sharing("a", ONE_SITE, {"head": 2})
    room.add_sharing("b", ONE_SITE, {"head": 2})
    room.add_sharing("c", ONE_SITE, {"tail": 2})
    assert len(set(run_until_usable(bank, "a", "b"))) == 2
    with pytest.raises(OverCapacity, match="2 adapters of 384 bytes do not fit the adapter memory of 256 bytes"):
        bank.check_fits(["a", "c"])
    bank.set_pinned("a", True)
    bank.check_fits(["b"])
    with pytest.raises(OverCapacity, match=r"1 adapters of 192 bytes .* beside 192 bytes of pinned"):
        bank.check_fits(["c"])


def test_one_is_squeezed_in_beyond_the_budget_and_taken_off_again() -> None:
    room = BankRoom(2)
    bank = room.bank
    for uid in "abc":
        room.add(uid)
    run_until_usable(bank, "a", "b")
    bank.retain(["a", "b"])
    bank.squeeze_in("c")
    bank.advance(0)
    assert set(bank.stats().device_uids) == {"a", "b", "c"}
    assert (bank.stats().device_bytes, bank.stats().evictions) == (3 * SITE_BYTES, 0)
    bank.keep_to_budget("c")
    assert set(bank.stats().device_uids) == {"a", "b"}
    bank.release(["a"])
    bank.squeeze_in("c")
    bank.advance(0)
    bank.keep_to_budget("c")
    assert set(bank.stats().device_uids) == {"b", "c"}, "one that is idle made room"
    assert (bank.stats().device_bytes, bank.stats().evictions) == (2 * SITE_BYTES, 1)


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
