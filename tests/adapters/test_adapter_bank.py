"""The bank: slots, slices, budget, eviction; nothing usable before it is whole, nothing left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.adapters.packed import pack_adapter
from loraplex.errors import InternalError, InvalidAdapter, OverCapacity
from loraplex.types import Residency
from tests.fakes_adapters import SITE_BYTES, BankRoom, fake_delta, fake_tables, run_until_usable


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
    with pytest.raises(InvalidAdapter, match="adapter u: nothing of it differs from the base"):
        pack_adapter(replace(good, sites={}, identity=True), refs)
    assert all(not table.rows for table in tables)
