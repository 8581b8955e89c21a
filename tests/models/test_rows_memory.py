"""Own rows in memory: checked when they are packed, one copy of equal content, none left behind."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from loraplex.layers.rows import PackedRows, Rows, RowsForm, RowsSite
from loraplex.layers.rows_memory import RowsMemory
from loraplex.layers.rows_table import RowsTable
from loraplex_kernels.lora.slots import SlotBook
from loraplex_kernels.segments import Term, plan_rows

CPU = torch.device("cpu")
#: a device whose tensors hold no data: what is counted there needs none
META = torch.device("meta")
LINEAR = RowsSite(RowsForm.MULTIPLIED, 8, 6, torch.float32)
BIASED = replace(LINEAR, bias=True)
HEAD = replace(LINEAR, grows=True)
EMBEDDING = replace(HEAD, form=RowsForm.LOOKED_UP)
NORM = RowsSite(RowsForm.ELEMENTWISE, 8, 1, torch.float32)
CONV = RowsSite(RowsForm.CONVOLVED, 8, 4, torch.float32, bias=True)


def table(site: RowsSite = LINEAR, device: torch.device = CPU) -> RowsTable:
    return RowsTable(site, RowsMemory(SlotBook(), device))


def holds(book: SlotBook, slot: int) -> bool:
    try:
        book.check(plan_rows([(1, (Term(slot),))]))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("site", "rows", "message"),
    [
        (LINEAR, Rows(torch.ones(7, 6)), r"own rows are \[7, 6\], must be \[8, 6\]"),
        (LINEAR, Rows(torch.ones(9, 6)), r"own rows are \[9, 6\], must be \[8, 6\]"),
        (LINEAR, Rows(torch.ones(8, 5)), r"own rows are \[8, 5\], must be \[8, 6\]"),
        (LINEAR, Rows(torch.ones(6)), r"own rows are \[6\], must be \[8, 6\]"),
        (HEAD, Rows(torch.ones(7, 6)), r"own rows are \[7, 6\], must be \[8 or more, 6\]"),
        (HEAD, Rows(torch.ones(0, 6), torch.arange(0)), r"own rows are \[0, 6\], must be \[1 or more, 6\]"),
        (LINEAR, Rows(torch.ones(2, 6), torch.tensor([0, 8])), "run from 0 to 8, must rise and be below 8"),
        (LINEAR, Rows(torch.ones(2, 6), torch.tensor([-1, 3])), "run from -1 to 3"),
        (HEAD, Rows(torch.ones(3, 6), torch.tensor([2, 2, 9])), "run from 2 to 9, must rise$"),
        (HEAD, Rows(torch.ones(2, 6), torch.tensor([3, 1])), "run from 3 to 1, must rise$"),
        (HEAD, Rows(torch.ones(2, 6), torch.arange(3)), r"int64 \[3\], must be torch.int64 \[2\]"),
        (HEAD, Rows(torch.ones(2, 6), torch.arange(2).int()), r"int32 \[2\], must be torch.int64 \[2\]"),
        (NORM, Rows(torch.ones(7)), r"own rows are \[7\], must be all of \[8\]"),
        (NORM, Rows(torch.ones(2), torch.arange(2)), r"own rows are \[2\], must be all of \[8\]"),
        (CONV, Rows(torch.ones(8, 3), None, torch.ones(8)), r"own rows are \[8, 3\], must be \[8, 4\]"),
        (CONV, Rows(torch.ones(2, 4), torch.arange(2), torch.ones(2)), r"own rows are \[2, 4\], must be \[8, 4\]"),
        (CONV, Rows(torch.ones(8, 4), torch.arange(8), torch.ones(8)), r"own rows are \[8, 4\] by index, must be all"),
        (CONV, Rows(torch.ones(8, 4)), r"bias of the own rows is none, must be \[8\]"),
        (BIASED, Rows(torch.ones(8, 6)), r"bias of the own rows is none, must be \[8\]"),
        (BIASED, Rows(torch.ones(8, 6), None, torch.ones(7)), r"is \[7\], must be \[8\]"),
        (LINEAR, Rows(torch.ones(8, 6), None, torch.ones(8)), r"is \[8\], must be none"),
        (LINEAR, Rows(torch.full((8, 6), torch.nan)), "own rows: values that are not finite in torch.float32"),
        (BIASED, Rows(torch.ones(8, 6), None, torch.full((8,), torch.inf)), "the bias of the own rows: values"),
        (replace(NORM, dtype=torch.float16), Rows(torch.full((8,), 1e6)), "not finite in torch.float16"),
    ],
)
def test_rows_that_do_not_fit_are_refused(site: RowsSite, rows: Rows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(site).pack(rows)


def test_equal_content_is_packed_once_while_somebody_holds_it() -> None:
    memory = RowsMemory(SlotBook(), CPU)
    head, other, embedding = (RowsTable(site, memory) for site in (HEAD, HEAD, EMBEDDING))
    values = torch.randn(8, 6)
    packed = head.pack(Rows(values))
    assert other.pack(Rows(values.clone())) is packed
    assert head.pack(Rows(values + 1)) is not packed
    assert head.pack(Rows(values, torch.arange(8))) is not packed
    looked_up = embedding.pack(Rows(values))
    assert looked_up.values is not None
    assert (looked_up.key == packed.key) == (looked_up is packed)
    gone = weakref.ref(packed)
    del packed, looked_up
    gc.collect()
    assert gone() is None


def test_bytes_are_those_of_what_is_kept() -> None:
    rows = Rows(torch.randn(2, 6), torch.tensor([1, 9]))
    packed = table(EMBEDDING).pack(rows)
    assert packed.nbytes == 2 * 6 * 4 + 2 * 8
    assert (packed.num_known, packed.num_added, packed.reach) == (1, 1, 10)
    assert table(NORM).pack(Rows(torch.randn(8))).nbytes == 32
    file = torch.randn(100, 6)
    views = Rows(file[50:58], torch.arange(100)[:8], file.flatten()[:8])
    kept = table(BIASED).pack(views)
    for tensor, view in ((kept.indices, torch.arange(8)), (kept.bias, views.bias)):
        assert tensor is not None
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert torch.equal(tensor, view)
    looked_up = table(EMBEDDING).pack(Rows(views.values)).values
    assert looked_up is not None
    assert looked_up.untyped_storage().nbytes() == looked_up.nbytes
    assert torch.equal(looked_up, views.values)


def test_a_slot_on_a_cpu_refers_to_what_was_packed() -> None:
    one = table()
    packed = one.pack(Rows(torch.randn(8, 6)))
    one.write(3, packed)
    assert one.held[3] is packed
    assert one.memory.device_bytes == 0


def test_a_device_holds_one_copy_of_equal_content_until_the_last_slot_is_cleared() -> None:
    book = SlotBook()
    memory = RowsMemory(book, META)
    head, embedding = RowsTable(HEAD, memory), RowsTable(EMBEDDING, memory)
    values = torch.randn(9, 6)
    packed = head.pack(Rows(values))
    assert embedding.pack(Rows(values)) is packed  # one content, one memory, though one multiplies and one looks up
    assert packed.values is not None
    assert packed.values.device == CPU
    head.write(0, packed)
    head.write(1, packed)
    embedding.write(0, packed)
    assert head.held[0] is head.held[1] is embedding.held[0]
    assert head.held[0].values is not None
    assert head.held[0].values.device == META
    assert memory.device_bytes == packed.nbytes == 9 * 6 * 4
    head.write(1, head.pack(Rows(values + 1)))
    assert memory.device_bytes == 2 * packed.nbytes
    for slot in (0, 1):
        assert holds(book, slot)
        head.clear(slot)
    assert memory.device_bytes == packed.nbytes
    assert holds(book, 0)
    assert not holds(book, 1)
    embedding.clear(0)
    assert memory.device_bytes == 0
    assert not memory.slots
    assert not holds(book, 0)


def test_a_write_that_finds_no_room_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    book = SlotBook()
    one = RowsTable(LINEAR, RowsMemory(book, META))
    first, second = (one.pack(Rows(torch.randn(8, 6))) for _ in range(2))
    one.write(0, first)
    held = one.held[0]

    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(torch.Tensor, "to", refuse)
    for slot in (0, 1):
        with pytest.raises(MemoryError, match="meta has no room for 192 bytes of an adapter's own rows"):
            one.write(slot, second)
    monkeypatch.undo()
    assert one.held == {0: held}
    assert one.memory.device_bytes == 192
    assert not holds(book, 1)
    one.write(0, second)
    assert one.memory.device_bytes == 192
    assert isinstance(one.held[0], PackedRows)


def test_neighbours_of_equal_content_are_one_product() -> None:
    memory = RowsMemory(SlotBook(), CPU)
    one = RowsTable(LINEAR, memory)
    values = torch.randn(8, 6)
    for slot in (0, 1, 2):
        one.write(slot, one.pack(Rows(values if slot < 2 else values + 1)))

    class Plan:
        segments = plan_rows([(1, (Term(0),)), (2, (Term(1),)), (1, ()), (1, (Term(1),)), (1, (Term(2),))])

    found = one.of(Plan())
    assert [(o.segment.start, o.segment.stop) for o in found] == [(0, 3), (4, 5), (5, 6)]
    assert found[0].rows is found[1].rows is one.held[0]


def test_two_adapters_own_rows_in_one_sum_are_never_added_up() -> None:
    one = table()
    for slot in (0, 1):
        one.write(slot, one.pack(Rows(torch.randn(8, 6))))

    class Plan:
        segments = plan_rows([(1, (Term(0), Term(1)))])

    with pytest.raises(AssertionError, match="own rows in one sum"):
        one.of(Plan())
