"""The bank: slots, slices, budget, eviction; nothing usable before it is whole, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.delta import SiteDelta
from loraplex.adapters.packed import pack_adapter
from loraplex.errors import InternalError, InvalidAdapter, OverCapacity
from loraplex.types import Residency
from loraplex_kernels.lora import Fence
from loraplex_kernels.lora.fence import AlwaysDone
from tests.fakes_adapters import SlowFences, StepClock, fake_delta, fake_tables

LAYERS = 3
SITE_BYTES = 2 * 8 * 4  # rank 1, hidden 8, float32
ONE_SITE = ("model.layers.0.q_proj",)


class Room:
    """A bank over fresh tables."""

    def __init__(self, budget_sites: int = 1 << 14, fence: Callable[[], Fence] = AlwaysDone) -> None:
        self.tables, self.refs = fake_tables(LAYERS)
        self.bank = AdapterBank(fence, budget_sites * SITE_BYTES, StepClock())

    def add(self, uid: str, sites: Iterable[str] = ONE_SITE, rank: int = 1, scale: float = 2.0) -> None:
        self.bank.add(pack_adapter(fake_delta(uid, sites, rank, scale=scale), self.refs))

    def num_written(self) -> int:
        """Slots filled, over all tables."""
        return sum(len(table.rows) for table in self.tables)


def run_until_usable(bank: AdapterBank, *uids: str) -> tuple[int, ...]:
    for _ in range(100):
        slots = bank.ensure(uids)
        if slots is not None:
            return slots
        bank.advance(0.0)
    raise AssertionError(f"{uids} never became usable")


def test_packed_parts_are_written_by_one_call_with_the_scale_in_b() -> None:
    room = Room()
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
    room = Room()
    bank = room.bank
    room.add("u", room.refs)
    assert bank.residency("u") is Residency.HOST
    assert bank.ensure(["u"]) is None
    done = []
    for written in range(1, 2 * LAYERS + 1):
        done += bank.advance(0.0).done
        assert room.num_written() == written
        usable = written == 2 * LAYERS
        assert (bank.ensure(["u"]) is not None) is usable
        assert bank.residency("u") is (Residency.DEVICE if usable else Residency.HOST)
        assert bank.uploading is not usable
    assert [(upload.uid, upload.seconds) for upload in done] == [("u", 2.0 * LAYERS)]
    assert bank.stats().uploads == 1
    room.add("v", room.refs)
    assert bank.ensure(["v"]) is None
    assert len(bank.advance(1e9).done) == 1


def test_least_recently_used_goes_first_and_returns_on_use() -> None:
    room = Room(2)
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
    room = Room(1)
    bank = room.bank
    for uid in "abcd":
        room.add(uid)
        assert run_until_usable(bank, uid) == (0,)
        bank.advance(0)


def test_what_runs_or_is_pinned_stays() -> None:
    room = Room(2)
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
    room = Room(2)
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
    room = Room(3)
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
    room = Room(1)
    bank = room.bank
    room.add("a")
    room.add("b")
    bank.prefetch("a")
    bank.advance(0)
    assert bank.residency("a") is Residency.DEVICE
    bank.prefetch("b")
    assert not bank.uploading


def test_removal_in_the_middle_of_an_upload_leaves_nothing() -> None:
    room = Room()
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
    room = Room()
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
    room = Room(4)
    bank = room.bank
    room.add("a")
    room.add("a")
    assert bank.stats().host_bytes == SITE_BYTES


def test_an_adapter_is_usable_only_when_its_copies_have_arrived() -> None:
    fences = SlowFences()
    room = Room(fence=fences)
    bank = room.bank
    room.add("u", room.refs)
    room.add("v")
    assert bank.ensure(["u"]) is None
    assert bank.advance(1e9).done == ()
    assert room.num_written() == 2 * LAYERS
    for _ in range(3):
        assert bank.ensure(["u"]) is None
        assert bank.advance(1e9).done == ()
        assert (bank.uploading, bank.is_uploading("u"), bank.residency("u")) == (True, True, Residency.HOST)
    assert bank.stats().device_uids == ()
    bank.prefetch("v")
    bank.advance(1e9)
    fences.pass_some(1)
    assert [upload.uid for upload in bank.advance(0).done] == ["u"]
    assert bank.ensure(["u"]) == (0,)
    assert bank.uploading, "v's copies are still under way"
    assert bank.ensure(["v"]) is None
    fences.pass_some(1)
    assert [upload.uid for upload in bank.advance(0).done] == ["v"]
    assert not bank.uploading
    assert bank.stats().uploads == 2


def test_what_is_on_its_way_is_not_evicted_for_another() -> None:
    fences = SlowFences()
    room = Room(1, fences)
    bank = room.bank
    room.add("a")
    room.add("b")
    bank.ensure(["a"])
    bank.advance(1e9)
    bank.advance(1e9)
    assert bank.ensure(["b"]) is None
    assert bank.is_uploading("a")
    assert not bank.is_uploading("b")
    fences.pass_some(1)
    bank.advance(0)
    bank.advance(0)
    assert bank.ensure(["b"]) is None
    assert bank.is_uploading("b")
    assert bank.residency("a") is Residency.HOST


def test_removal_before_the_copies_arrived_leaves_nothing_and_its_fence_means_nothing() -> None:
    fences = SlowFences()
    room = Room(fence=fences)
    bank = room.bank
    room.add("u", room.refs)
    bank.ensure(["u"])
    bank.advance(1e9)
    bank.remove("u")
    assert room.num_written() == 0
    assert not bank.uploading
    assert (bank.stats().device_bytes, bank.stats().host_bytes) == (0, 0)
    room.add("u")
    bank.ensure(["u"])
    bank.advance(1e9)
    fences.pass_some(1)  # the first upload's
    assert bank.advance(1e9).done == ()
    assert bank.ensure(["u"]) is None
    fences.pass_some(1)
    assert len(bank.advance(1e9).done) == 1
    assert bank.ensure(["u"]) == (0,)


def test_a_write_that_fails_beside_pending_fences_fails_alone() -> None:
    fences = SlowFences()
    room = Room(fence=fences)
    bank = room.bank
    room.add("good")
    room.add("bad", room.refs)
    bank.ensure(["good"])
    bank.advance(1e9)
    room.tables[3].refusal = MemoryError("no")
    bank.ensure(["bad"])
    progress = bank.advance(1e9)
    assert (progress.done, [upload.uid for upload in progress.failed]) == ((), ["bad"])
    assert (room.num_written(), bank.is_uploading("good"), bank.is_uploading("bad")) == (1, True, False)
    room.tables[3].refusal = None
    bank.ensure(["bad"])
    bank.advance(1e9)
    fences.pass_some(2)
    assert [upload.uid for upload in bank.advance(0).done] == ["good", "bad"]


def test_a_fence_that_cannot_be_made_fails_the_upload() -> None:
    def broken() -> Fence:
        raise RuntimeError("CUDA error")

    room = Room(fence=broken)
    room.add("u", room.refs)
    room.bank.ensure(["u"])
    (failed,) = room.bank.advance(1e9).failed
    assert isinstance(failed.error, InternalError)
    assert room.num_written() == 0
    assert not room.bank.uploading


def test_what_no_table_can_take_is_refused_by_its_sites() -> None:
    tables, refs = fake_tables(1)
    sites = ["model.layers.0.q_proj", "model.layers.0.v_proj"]
    good = fake_delta("u", sites)
    broken = {**good.sites, sites[1]: SiteDelta(torch.full((1, 8), float("inf")), torch.ones(8, 1), 1.0)}
    with pytest.raises(
        InvalidAdapter, match=r"q_proj' \(part 0\), 'model.layers.0.v_proj' \(part 2\): part 2: A holds"
    ):
        pack_adapter(replace(good, sites=broken), refs)
    with pytest.raises(InvalidAdapter, match=r"o_proj' \(part 0\): part 0: A is \[1, 9\]"):
        pack_adapter(fake_delta("u", ["model.layers.0.o_proj"], hidden=9), refs)
    assert all(not table.rows for table in tables)


class Traffic(RuleBasedStateMachine):
    """Adapters of several sizes used, released, removed and pinned in any order under a small budget."""

    sizes = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}  # noqa: RUF012
    budget = 6
    names = st.sampled_from(sorted(sizes))

    def __init__(self) -> None:
        super().__init__()
        self.fences = SlowFences()
        self.room = Room(self.budget, self.fences)
        self.bank = self.room.bank
        self.added: set[str] = set()
        self.pinned: set[str] = set()
        self.running: list[tuple[str, ...]] = []

    @rule(uid=names)
    def add(self, uid: str) -> None:
        sites = [site for site in self.room.refs if site.endswith(("q_proj", "o_proj"))][: self.sizes[uid]]
        self.room.add(uid, sites)
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
            assert sum(self.sizes[uid] for uid in {*wanted, *self.pinned}) > self.budget
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
            assert sum(self.sizes[other] for other in self.pinned | {uid}) > self.budget
            return
        (self.pinned.add if pinned else self.pinned.discard)(uid)

    @rule(uid=names)
    def remove(self, uid: str) -> None:
        if uid in self.added and not any(uid in uids for uids in self.running):
            self.bank.remove(uid)
            self.added.discard(uid)
            self.pinned.discard(uid)

    @invariant()
    def tables_hold_what_is_resident(self) -> None:
        stats = self.bank.stats()
        assert stats.device_bytes <= self.budget * SITE_BYTES
        assert stats.host_bytes == sum(self.sizes[uid] for uid in self.added) * SITE_BYTES
        assert {uid for uids in self.running for uid in uids} <= set(stats.device_uids)
        slots = self.bank.slots(stats.device_uids)
        assert len(set(slots)) == len(slots)
        for uid, slot in zip(stats.device_uids, slots, strict=True):
            assert sum(slot in table.rows for table in self.room.tables) == self.sizes[uid]
        if not self.bank.uploading:
            assert {slot for table in self.room.tables for slot in table.rows} == set(slots)

    def teardown(self) -> None:
        for uids in self.running:
            self.bank.release(uids)
        for uid in sorted(self.added):
            self.bank.remove(uid)
        stats = self.bank.stats()
        assert (stats.device_bytes, stats.host_bytes) == (0, 0)
        assert all(not table.rows for table in self.room.tables)
        assert not self.bank.uploading


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
