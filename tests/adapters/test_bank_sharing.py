"""The bank and content that several adapters have: one memory, counted once, there until its last holder goes."""

from __future__ import annotations

import pytest

from loraplex.adapters.ledger import Footprint
from loraplex.errors import OverCapacity
from tests.fakes_adapters import ONE_SITE, SITE_BYTES, BankRoom, run_until_usable


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
