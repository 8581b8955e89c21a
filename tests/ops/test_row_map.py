"""Rows of a stack: whatever is wanted together lies apart and close."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_kernels.lora.rows import SLACK, SLACK_ROWS, RowMap

RANKS = st.dictionaries(st.integers(0, 12), st.sampled_from([1, 4, 8, 13, 64]), min_size=13, max_size=13)
STEPS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 12), min_size=1, max_size=8, unique=True), st.lists(st.integers(0, 12), max_size=3)
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(RANKS, STEPS)
def test_wanted_slots_lie_apart_and_close(ranks: dict[int, int], steps: list[tuple[list[int], list[int]]]) -> None:
    rows = RowMap()
    copied: dict[int, tuple[int, int]] = {}  # slot -> where its contents were last copied to
    for wanted, forgotten in steps:
        for slot in rows.place({slot: ranks[slot] for slot in wanted}):
            start, stop = rows.rows(slot)
            copied = {other: at for other, at in copied.items() if at[1] <= start or stop <= at[0]}
            copied[slot] = (start, stop)
        placed = sorted(rows.rows(slot) for slot in wanted)
        assert all(stop - start == ranks[slot] for slot in wanted for start, stop in [rows.rows(slot)])
        assert placed[0][0] >= 0
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(placed))
        assert placed[-1][1] - placed[0][0] <= SLACK * sum(ranks[slot] for slot in wanted) + SLACK_ROWS
        assert all(copied[slot] == rows.rows(slot) for slot in wanted), "a slot's contents were not copied"
        for slot in forgotten:
            rows.forget(slot)
            copied.pop(slot, None)


def test_an_idle_slot_keeps_its_rows_until_they_are_needed() -> None:
    rows = RowMap()
    assert rows.place({0: 8, 1: 8}) == [0, 1]
    assert rows.place({1: 8}) == []
    assert rows.place({0: 8, 1: 8}) == []
    assert rows.place({1: 8, 2: 8}) == [2]
    assert rows.place({0: 8, 1: 8}) == [0]
