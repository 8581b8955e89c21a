"""The bank over a device whose copies arrive late: nothing is usable before its fence is done."""

from __future__ import annotations

from loraplex.errors import InternalError
from loraplex.types import Residency
from loraplex_kernels.lora import Fence
from tests.fakes_adapters import BankRoom, SlowFences


def test_an_adapter_is_usable_only_when_its_copies_have_arrived() -> None:
    fences = SlowFences()
    room = BankRoom(fence=fences)
    bank = room.bank
    room.add("u", room.refs)
    room.add("v")
    assert bank.ensure(["u"]) is None
    assert bank.advance(1e9).done == ()
    assert room.num_written() == 2 * BankRoom.LAYERS
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
    room = BankRoom(1, fences)
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
    room = BankRoom(fence=fences)
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
    room = BankRoom(fence=fences)
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

    room = BankRoom(fence=broken)
    room.add("u", room.refs)
    room.bank.ensure(["u"])
    (failed,) = room.bank.advance(1e9).failed
    assert isinstance(failed.error, InternalError)
    assert room.num_written() == 0
    assert not room.bank.uploading
