"""The lora op's slots: what is written, replaced and cleared; what pack, write and prepare refuse."""

from __future__ import annotations

import threading

import pytest
import torch

from loraplex_kernels.lora import Factors, PartDelta, SlotDelta
from loraplex_kernels.segments import Term, plan_rows
from loraplex_kernels.testing import decode_plan, expected_output, mixed_slots, random_factors, worst_excess
from tests.ops.lora_subjects import Subject

FACTORS = PartDelta(Factors(torch.ones(1, 4), torch.ones(3, 1)))


def shift(value: float, size: int = 1) -> SlotDelta:
    """One part that adds ``value``."""
    return SlotDelta((PartDelta(shift=torch.full((size,), value)),))


def shown(subject: Subject, table: object, *slots: int) -> list[float]:
    """What each slot of a one-column table adds to zero."""
    zeros = torch.zeros(len(slots), 1)
    return subject.added(table, zeros, zeros, decode_plan(slots)).flatten().tolist()  # type: ignore[arg-type]


def test_slots_are_rewritten_and_cleared(subject: Subject, generator: torch.Generator) -> None:
    parts = (12, 12)
    slots: dict[int, SlotDelta] = {}
    table = subject.table(20, parts, torch.float32)
    other = subject.fill_elsewhere(range(12))
    for step in range(24):
        slot = int(torch.randint(12, (1,), generator=generator))
        if step % 4 == 3:
            table.clear(slot)
            slots.pop(slot, None)
        else:
            made = [PartDelta(random_factors(1 + step % 7, 20, size, generator)) for size in parts]
            slots[slot] = SlotDelta((None, made[1]) if step % 5 == 0 else tuple(made))
            table.write(slot, table.pack(slots[slot]))
        plan = decode_plan(torch.randperm(12, generator=generator)[:5].sort().values.tolist())
        x, y = torch.randn(5, 20, generator=generator), torch.randn(5, 24, generator=generator)
        got = subject.added(table, y, x, plan)
        assert worst_excess(got, expected_output(y, x, plan, slots, parts), torch.float32) <= 1, step
    assert other.part_sizes == (1,)


def test_few_active_among_many_resident(subject: Subject, generator: torch.Generator) -> None:
    slots = {slot: SlotDelta((PartDelta(random_factors(1 + slot % 5, 16, 8, generator)),)) for slot in range(300)}
    table = subject.table(16, (8,), torch.float32, slots)
    for wanted in ([3, 120, 121, 299], [0, 1, 298], list(range(0, 300, 10)), [3, 120, 121, 299]):
        plan = decode_plan(wanted)
        x, y = torch.randn(len(wanted), 16, generator=generator), torch.randn(len(wanted), 8, generator=generator)
        got = subject.added(table, y, x, plan)
        assert worst_excess(got, expected_output(y, x, plan, slots, (8,)), torch.float32) <= 1


def test_a_write_replaces_everything_of_its_slot(subject: Subject) -> None:
    full = SlotDelta((FACTORS, PartDelta(None, torch.full((2,), 3.0), torch.ones(2))), torch.full((4,), 2.0))
    table = subject.table(4, (3, 2), torch.float32, {5: full})
    plan, x, y = decode_plan([5]), torch.ones(1, 4), torch.ones(1, 5)
    assert subject.added(table, y, x, plan).tolist() == [[5.0, 5.0, 5.0, 4.0, 4.0]]
    assert subject.scaled(table, x, plan).tolist() == [[2.0] * 4]
    table.write(5, table.pack(SlotDelta((PartDelta(shift=torch.ones(3)), None))))
    assert subject.added(table, y, x, plan).tolist() == [[2.0, 2.0, 2.0, 1.0, 1.0]]
    assert torch.equal(subject.scaled(table, x, plan), x)


def test_the_last_write_holds_in_whatever_order_deltas_were_packed(subject: Subject) -> None:
    table = subject.table(1, (1,), torch.float32)
    first, second, third = (table.pack(shift(value)) for value in (1.0, 2.0, 3.0))
    table.write(0, third)
    table.write(1, first)
    table.write(0, second)
    assert shown(subject, table, 0, 1) == [2.0, 1.0]
    table.clear(0)
    table.write(2, third)
    table.write(0, second)  # what was packed once can be written again, as after an eviction
    assert shown(subject, table, 0, 1, 2) == [2.0, 1.0, 3.0]


def test_what_was_packed_keeps_its_values(subject: Subject) -> None:
    source = torch.ones(1)
    table = subject.table(1, (1,), torch.float32)
    packed = table.pack(SlotDelta((PartDelta(Factors(torch.ones(1, 1), torch.ones(1, 1)), shift=source),), source))
    source.fill_(9.0)
    table.write(0, packed)
    assert shown(subject, table, 0) == [1.0]
    assert subject.scaled(table, torch.ones(1, 1), decode_plan([0])).item() == 1.0
    assert packed.nbytes >= 12


def test_packing_in_another_thread_disturbs_no_product(subject: Subject, generator: torch.Generator) -> None:
    slots = mixed_slots(4, 32, (16, 8), torch.float32, generator)
    table = subject.table(32, (16, 8), torch.float32, slots)
    x, y = torch.randn(4, 32, generator=generator), torch.randn(4, 24, generator=generator)
    expected = subject.added(table, y, x, decode_plan(range(4)))
    packed, stop = [], threading.Event()

    def pack() -> None:
        while not stop.is_set():
            packed[:] = [table.pack(delta) for delta in slots.values()]

    thread = threading.Thread(target=pack)
    thread.start()
    try:
        for _ in range(10):
            assert torch.equal(subject.added(table, y, x, decode_plan(range(4))), expected)
    finally:
        stop.set()
        thread.join()
    for slot, content in zip((2, 3, 0, 1), packed, strict=True):
        table.write(slot, content)
    got = subject.added(table, y, x, decode_plan([2, 3, 0, 1]))
    assert worst_excess(got, expected, torch.float32) <= 1


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (SlotDelta((FACTORS,)), r"1 parts given, the table has 2"),
        (SlotDelta((None, None)), "changes nothing"),
        (SlotDelta((PartDelta(), None)), "changes nothing"),
        (
            SlotDelta((None, PartDelta(Factors(torch.ones(2, 3), torch.ones(2, 2))))),
            r"part 1: A is \[2, 3\] .* must be \[r, 4\]",
        ),
        (SlotDelta((PartDelta(Factors(torch.ones(2, 4), torch.ones(3, 1))), None)), r"part 0: .* B is \[3, 1\]"),
        (SlotDelta((PartDelta(Factors(torch.ones(0, 4), torch.ones(3, 0))), None)), r"r >= 1"),
        (
            SlotDelta((PartDelta(Factors(torch.full((1, 4), float("nan")), torch.ones(3, 1))), None)),
            r"part 0: A holds .* not finite",
        ),
        (
            SlotDelta((PartDelta(Factors(torch.ones(1, 4), torch.full((3, 1), 1e39, dtype=torch.float64))), None)),
            r"part 0: B holds .* not finite",
        ),
        (SlotDelta((FACTORS, PartDelta(out_scale=torch.ones(3)))), r"part 1: out_scale is \[3\], must be \[2\]"),
        (SlotDelta((FACTORS, PartDelta(shift=torch.ones(2, 1)))), r"part 1: shift is \[2, 1\], must be \[2\]"),
        (SlotDelta((FACTORS, None), torch.ones(3)), r"in_scale is \[3\], must be \[4\]"),
        (SlotDelta((FACTORS, None), torch.full((4,), float("inf"))), r"in_scale holds .* not finite"),
        (SlotDelta((PartDelta(shift=torch.full((3,), float("nan"))), None)), r"part 0: shift holds .* not finite"),
        (
            SlotDelta((PartDelta(out_scale=torch.full((3,), 1e39, dtype=torch.float64)), None)),
            r"part 0: out_scale holds .* not finite in torch.float32",
        ),
    ],
)
def test_pack_refuses(subject: Subject, delta: SlotDelta, message: str) -> None:
    table = subject.table(4, (3, 2), torch.float32, {5: SlotDelta((FACTORS, None))})
    with pytest.raises(ValueError, match=message):
        table.pack(delta)
    y = subject.added(table, torch.zeros(1, 5), torch.ones(1, 4), decode_plan([5]))
    assert y.tolist() == [[4.0, 4.0, 4.0, 0.0, 0.0]]


def test_write_refuses_a_negative_slot(subject: Subject) -> None:
    table = subject.table(1, (1,), torch.float32)
    with pytest.raises(ValueError, match="slot -1 is negative"):
        table.write(-1, table.pack(shift(1.0)))


def test_prepare_refuses_a_slot_that_holds_nothing_anywhere(subject: Subject) -> None:
    table, other = subject.table(1, (1,), torch.float32), subject.table(1, (1,), torch.float32)
    plan = plan_rows([(2, ()), (3, (Term(0), Term(7)))])
    packed = table.pack(shift(1.0))
    table.write(0, packed)
    with pytest.raises(ValueError, match=r"rows 2:5 of the step name slot 7, .* in any table; 1 slots do"):
        subject.backend.prepare(plan)
    table.write(7, packed)
    other.write(7, other.pack(shift(1.0)))
    table.write(7, packed)  # replaced: still one table more, not two
    subject.backend.prepare(plan)
    table.clear(7)
    table.clear(7)
    subject.backend.prepare(plan)  # the other table still has it
    other.clear(7)
    with pytest.raises(ValueError, match="name slot 7"):
        subject.backend.prepare(plan)  # though it prepared an equal plan before
    table.write(7, packed)
    subject.backend.prepare(plan)
    assert shown(subject, table, 7) == [1.0]


def test_uploads_end(subject: Subject) -> None:
    table = subject.table(1, (1,), torch.float32, {0: shift(1.0)})
    fence = subject.backend.fence()
    assert shown(subject, table, 0) == [1.0]  # a step waits for what was written before it
    assert fence.done()


def test_equal_segments_have_equal_keys(subject: Subject) -> None:
    subject.table(1, (1,), torch.float32, {0: shift(1.0), 1: shift(2.0)})
    key = subject.backend.graph_key
    assert key(decode_plan([0, 1])) == key(decode_plan([0, 1]))
    assert hash(key(decode_plan([None]))) == hash(key(plan_rows([(1, ())])))
    assert key(decode_plan([None, None])) != key(decode_plan([0, 1]))
