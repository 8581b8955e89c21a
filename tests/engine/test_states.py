"""States beside pages, as policy: who has which slot, what is saved, what is found again. No tensors."""

from __future__ import annotations

import pytest
from hypothesis import settings

from loraplex.engine.scheduler import Scheduler, SchedulerLimits
from loraplex.engine.sequence import Sequence, SequenceState
from loraplex.state.slots import NO_SLOT, StateSlots
from loraplex_kernels.states import BLANK
from tests.fakes_scheduler import Memory, make, scheduler_of, step
from tests.scheduler_machine import SchedulerMachine


class ScarceSlots(SchedulerMachine):
    """As many slots as sequences may run: what is saved makes way for them."""

    NUM_SLOTS = 3


class HybridStates(SchedulerMachine):
    """Slots to save in, and few pages: sequences are preempted."""

    NUM_SLOTS = 7


class LimitedStates(SchedulerMachine):
    """Nothing of an answer may be found by anybody."""

    NUM_SLOTS = 6
    LIMITED = True


class FreePages(SchedulerMachine):
    """Pages without memory: slots alone are scarce."""

    NUM_SLOTS, NUM_PAGES = 5, 200


@pytest.mark.parametrize("machine", [ScarceSlots, HybridStates, LimitedStates, FreePages])
def test_in_any_order_nothing_leaks_and_what_is_found_is_what_would_be_computed(
    machine: type[SchedulerMachine],
) -> None:
    case = machine.TestCase("runTest")
    case.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)  # type: ignore[attr-defined]
    case.runTest()


def new(*, slots: int = 8, pages: int = 64, size: int = 4, tokens: int = 64, limited: bool = False) -> Scheduler:
    return scheduler_of(SchedulerLimits(2, tokens, 16), pages, size, num_slots=slots, limited=limited)


def run(scheduler: Scheduler, sequence: Sequence, memory: Memory | None = None) -> Sequence:
    """The sequence alone, to its end."""
    scheduler.add(sequence)
    while sequence.state is not SequenceState.FINISHED:
        step(scheduler, memory)
    return sequence


def with_prompt(ticket: int, prompt: list[int], outputs: int = 1, **fields: int) -> Sequence:
    sequence = make(ticket, len(prompt), outputs=outputs, **fields)
    sequence.token_ids[:] = prompt
    return sequence


def snapshots(scheduler: Scheduler) -> list[int]:
    """The slots of all snapshots, oldest use first."""
    assert scheduler.states is not None
    return [snapshot.slot for snapshot in scheduler.states.slots._snapshots.values()]


def test_no_slot_is_what_the_kernels_take_for_blank() -> None:
    assert NO_SLOT == BLANK


def test_a_sequence_begins_blank_and_goes_on_in_its_slot() -> None:
    scheduler = new(tokens=4)
    scheduler.add(make(1, 9))
    first, second, third = (step(scheduler).chunks[0] for _ in range(3))
    assert (first.source, second.source, third.source) == (BLANK, first.slot, first.slot)
    assert first.slot == second.slot == third.slot
    assert [chunk.saves for chunk in (first, third)] == [(), ()]
    assert [count for count, _ in second.saves] == [4], "the last border that leaves a token to compute"


def test_the_same_prompt_goes_on_behind_its_last_page() -> None:
    scheduler, memory = new(), Memory(4, 8)
    assert run(scheduler, make(1, 10, outputs=1), memory).num_cached_prompt == 0
    again = make(1, 10, outputs=1)
    scheduler.add(again)
    (chunk,) = step(scheduler, memory).chunks
    assert (again.num_cached_prompt, chunk.start, chunk.count, chunk.saves) == (8, 8, 2, ())
    assert [chunk.source] == snapshots(scheduler)
    assert chunk.source != chunk.slot


def test_the_third_of_a_shared_prefix_goes_on_where_the_second_parted() -> None:
    scheduler, memory, shared = new(), Memory(4, 8), list(range(12))
    assert run(scheduler, with_prompt(1, [*shared, *range(50, 60)]), memory).num_cached_prompt == 0
    assert run(scheduler, with_prompt(2, [*shared, *range(60, 70)]), memory).num_cached_prompt == 0
    third = with_prompt(3, [*shared, *range(70, 80)])
    scheduler.add(third)
    (chunk,) = step(scheduler, memory).chunks
    assert (third.num_cached_prompt, chunk.start) == (12, 12)
    assert [12 + count for count, _ in chunk.saves] == [20], "its own; where it parts is saved already"


def test_the_next_turn_goes_on_behind_the_answer() -> None:
    scheduler, memory = new(), Memory(4, 8)
    first = run(scheduler, make(1, 6, outputs=12), memory)
    assert len(snapshots(scheduler)) == 2, "the prompt's, and the one that moved on with the answer"
    following = run(scheduler, with_prompt(2, [*first.token_ids, 8, 9, 10]), memory)
    assert following.num_cached_prompt == 16, "17 of its tokens were computed"


def test_an_answer_keeps_one_snapshot_that_moves() -> None:
    scheduler = new()
    scheduler.add(make(1, 3, outputs=30))
    slots: set[int] = set()
    for _ in range(29):
        for chunk in step(scheduler).chunks:
            slots.update(slot for _, slot in chunk.saves)
            assert not chunk.saves or (chunk.start + chunk.count) % 4 == 0
        assert len(snapshots(scheduler)) <= 1
    assert len(slots) == 1


def test_a_snapshot_that_another_went_on_from_stays() -> None:
    scheduler, memory = new(), Memory(4, 8)
    first = make(1, 3, outputs=30)
    scheduler.add(first)
    for _ in range(7):
        step(scheduler, memory)
    assert len(snapshots(scheduler)) == 1
    second = with_prompt(2, [*first.token_ids[:9], 3], outputs=1)
    assert run(scheduler, second, memory).num_cached_prompt == 8
    used = snapshots(scheduler)
    for _ in range(8):
        step(scheduler, memory)
    assert set(used) < set(snapshots(scheduler))


def test_without_prompt_tokens_to_spare_nothing_is_saved() -> None:
    scheduler = new()
    run(scheduler, make(1, 4, outputs=1))
    assert snapshots(scheduler) == []


def test_running_sequences_come_before_snapshots() -> None:
    scheduler, memory = new(slots=2), Memory(4, 2)
    run(scheduler, make(1, 10, outputs=1), memory)
    assert len(snapshots(scheduler)) == 1
    for ticket in (2, 3):
        scheduler.add(make(ticket, 10, outputs=3))
    assert len(step(scheduler, memory).chunks) == 2
    assert snapshots(scheduler) == []


def test_without_another_slot_the_snapshots_own_is_taken_over() -> None:
    scheduler, memory = new(slots=2), Memory(4, 2)
    run(scheduler, make(1, 10, outputs=1), memory)
    scheduler.add(make(2, 3, outputs=9))
    step(scheduler, memory)
    scheduler.add(make(1, 10, outputs=1))
    chunk = step(scheduler, memory).chunks[-1]
    assert (chunk.start, chunk.source) == (8, chunk.slot)
    assert snapshots(scheduler) == []


def test_two_begin_from_one_snapshot_in_one_step() -> None:
    scheduler, memory = new(slots=3), Memory(4, 3)
    run(scheduler, make(1, 10, outputs=1), memory)
    for _ in range(2):
        scheduler.add(make(1, 10, outputs=3))
    one, other = step(scheduler, memory).chunks
    assert one.source == other.source != one.slot != other.slot


def test_a_step_that_reads_a_snapshot_gives_it_to_nobody() -> None:
    slots = StateSlots(2)
    kept = slots.take()
    assert kept is not None
    slots.keep(kept, page=5)
    assert slots.begin(5) == (1 - kept, kept)
    assert slots.begin(5) is None, "nobody may write what another reads in this step"
    assert slots.take() is None
    slots.begin_step()
    assert slots.begin(5) == (kept, kept)
    assert slots.num_held == 2


def test_snapshots_make_way_in_the_order_of_their_last_use() -> None:
    slots = StateSlots(4)
    for page in (11, 12, 13):
        slot = slots.take()
        assert slot is not None
        slots.keep(slot, page)
    begun = slots.begin(11)
    assert begun is not None
    slots.begin_step()
    assert [slots.take(), slots.take(), slots.take(), slots.take()] == [1, 2, 0, None]


def test_a_forgotten_page_takes_its_snapshot_along() -> None:
    scheduler = new(pages=7, size=2)
    run(scheduler, make(1, 5, outputs=1))
    assert len(snapshots(scheduler)) == 1
    run(scheduler, make(2, 12, outputs=1))
    assert scheduler.states is not None
    assert scheduler.pages.match(make(1, 5).lineage, make(1, 5).token_ids) == []
    assert scheduler.states.slots.num_snapshots == 1, "that of the second prompt"


def test_a_second_snapshot_behind_one_page_is_given_back() -> None:
    scheduler, memory = new(), Memory(4, 8)
    for _ in range(2):
        scheduler.add(make(1, 10, outputs=1))
    assert [bool(chunk.saves) for chunk in step(scheduler, memory).chunks] == [True, True]
    assert len(snapshots(scheduler)) == 1


def test_saves_leave_a_slot_to_the_first_that_waits() -> None:
    scheduler = new(slots=2, tokens=12)
    scheduler.add(make(1, 17, outputs=4))
    scheduler.add(make(2, 10, outputs=4))
    step(scheduler)  # the first one's prompt takes the whole step
    assert [chunk.saves for chunk in step(scheduler).chunks] == [(), ()]
    assert len(scheduler.running) == 2


def test_of_a_model_that_limits_prompt_steps_nothing_of_an_answer_is_found() -> None:
    scheduler, memory = new(limited=True), Memory(4, 8, limited=True)
    first = run(scheduler, make(1, 6, outputs=12), memory)
    assert len(snapshots(scheduler)) == 1
    following = run(scheduler, with_prompt(2, [*first.token_ids, 8, 9, 10]), memory)
    assert following.num_cached_prompt == 4


def test_what_stands_for_a_limited_prompt_was_computed_as_one() -> None:
    """Pages of an answer are not published either: what a prompt of the same tokens saves would stand behind them."""
    scheduler, memory = new(limited=True), Memory(4, 8, limited=True)
    first = run(scheduler, make(1, 6, outputs=12), memory)
    for ticket, cached in ((2, 4), (3, 16)):
        following = run(scheduler, with_prompt(ticket, [*first.token_ids, 8, 9]), memory)
        assert following.num_cached_prompt == cached


def test_what_a_step_in_flight_saves_is_not_published_with_the_step_before() -> None:
    scheduler = new(size=1)
    sequence = make(1, 2, outputs=9)
    scheduler.add(sequence)
    step(scheduler)
    for _ in range(2):
        scheduler.launched(scheduler.schedule())
    assert sequence.states is not None
    first, second = sequence.states.saves
    before = snapshots(scheduler)
    scheduler.publish(sequence, first.num_tokens)
    sequence.append(7)
    assert sequence.states.saves == [second]
    assert snapshots(scheduler) == [*before, first.slot]
    scheduler.publish(sequence, second.num_tokens)
    assert snapshots(scheduler) == [*before, second.slot], "it has moved on"


def test_a_preempted_sequence_resumes_behind_its_answer() -> None:
    scheduler, memory = new(pages=6), Memory(4, 8)  # 5 usable pages: the third of the second sequence is not there
    first, second = make(1, 4, outputs=6), make(2, 4, outputs=7)
    for sequence in (first, second):
        scheduler.add(sequence)
    while not scheduler.num_preemptions:
        step(scheduler, memory)
    assert second.states is None
    while second.state is SequenceState.WAITING:
        chunk = step(scheduler, memory).chunks[-1]
    assert (chunk.sequence, chunk.start) == (second, 8)
    while scheduler.has_work:
        step(scheduler, memory)
    assert second.num_outputs == 7
