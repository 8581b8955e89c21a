"""The scheduler as policy: budgets, order, preemption, starvation. No tensors."""

from __future__ import annotations

import pytest
from hypothesis import settings

from loraplex.engine.scheduler import STARVATION_STEPS, Scheduler, SchedulerLimits
from loraplex.engine.sequence import SequenceState
from loraplex.errors import OverCapacity
from loraplex.state.pages import PageAllocator
from tests.fakes_scheduler import Memory, RoomySlots, make, step
from tests.scheduler_machine import SchedulerMachine


def new(*, pages: int = 64, page_size: int = 4, seqs: int = 8, tokens: int = 32, room: int = 99) -> Scheduler:
    limits = SchedulerLimits(seqs, tokens, max_waiting=16)
    return Scheduler(limits, PageAllocator(pages, page_size), RoomySlots(room))


def test_long_prompts_are_chunked_beside_decodes() -> None:
    scheduler = new(tokens=8)
    scheduler.add(make(1, prompt=4, outputs=9))
    step(scheduler)
    scheduler.add(make(2, prompt=20))
    batch = step(scheduler)
    assert [(c.sequence.origin.ticket, c.start, c.count, c.sample) for c in batch.chunks] == [
        (1, 4, 1, True),
        (2, 0, 7, False),
    ]
    assert [(c.start, c.count) for c in step(scheduler).chunks] == [(5, 1), (7, 7)]


def test_rows_are_ordered_by_phase_then_adapter() -> None:
    scheduler = new()
    for ticket, adapter in enumerate([2, None, 1, 2, 1], start=1):
        scheduler.add(make(ticket, prompt=3, adapter=adapter))
    assert [c.sequence.origin.ticket for c in step(scheduler).chunks] == [2, 3, 5, 1, 4]
    scheduler.add(make(6, prompt=3, adapter=1))
    assert [c.sequence.origin.ticket for c in step(scheduler).chunks] == [2, 3, 5, 1, 4, 6]


def test_priority_before_arrival() -> None:
    scheduler = new(seqs=1)
    for ticket, priority in [(1, 0), (2, 5), (3, 5)]:
        scheduler.add(make(ticket, priority=priority, outputs=1))
    assert [step(scheduler).chunks[0].sequence.origin.ticket for _ in range(3)] == [2, 3, 1]


def test_the_last_comer_is_preempted_and_resumes_from_the_prefix_index() -> None:
    scheduler = new(pages=6, page_size=2, seqs=2)  # 5 usable pages
    first, second = make(1, prompt=4, outputs=5), make(2, prompt=4, outputs=3)
    scheduler.add(first)
    scheduler.add(second)
    seen = 0
    for _ in range(20):
        batch = step(scheduler)
        seen += batch.num_preempted
        if batch.num_preempted:
            assert second.state is SequenceState.WAITING
            assert all(c.sequence is first for c in batch.chunks)
    assert seen >= 1
    assert first.num_outputs == 5
    assert second.num_outputs == 3
    assert scheduler.pages.num_held == 0


def test_shared_prefix_is_computed_once() -> None:
    scheduler = new(page_size=4)
    first, second = make(1, prompt=9, outputs=1), make(1, prompt=9, outputs=1)
    scheduler.add(first)
    step(scheduler)
    scheduler.add(second)
    batch = step(scheduler)
    assert second.num_cached_prompt == 8
    assert [(c.start, c.count) for c in batch.chunks] == [(8, 1)]


def test_another_adapter_shares_nothing() -> None:
    scheduler = new(page_size=4)
    for adapter in (None, 1, 2):
        sequence = make(1, prompt=9, adapter=adapter, outputs=1)
        scheduler.add(sequence)
        step(scheduler)
        assert sequence.num_cached_prompt == 0


def test_a_full_queue_refuses_with_a_retry_hint() -> None:
    scheduler = new()
    for ticket in range(16):
        scheduler.add(make(ticket))
    with pytest.raises(OverCapacity, match="16 requests wait already") as caught:
        scheduler.add(make(99))
    assert caught.value.retry_after_s > 0


def test_a_hot_adapter_cannot_starve_another() -> None:
    scheduler = new(room=1, seqs=4)
    for ticket in (1, 2):
        scheduler.add(make(ticket, adapter=1, outputs=10))
    step(scheduler)
    cold = make(3, adapter=2, outputs=1)
    ticket = 10
    scheduler.add(cold)
    for _ in range(STARVATION_STEPS + 40):
        if len(scheduler.waiting) < 4:  # adapter 1 keeps arriving, always one more than finishes
            ticket += 1
            scheduler.add(make(ticket, adapter=1, outputs=10))
        step(scheduler)
    assert cold.state is SequenceState.FINISHED


def test_without_room_for_its_adapter_a_sequence_is_overtaken() -> None:
    scheduler = new(room=1)
    scheduler.add(make(1, adapter=1, outputs=3))
    step(scheduler)
    scheduler.add(make(2, adapter=2, outputs=1))
    scheduler.add(make(3, adapter=1, outputs=1))
    assert [c.sequence.origin.ticket for c in step(scheduler).chunks] == [1, 3]


def test_what_lies_before_a_start_is_shared_with_the_base_and_with_other_adapters() -> None:
    scheduler, memory = new(page_size=4), Memory(4)

    def cached(ticket: int, **uses: int) -> int:
        sequence = make(ticket, prompt=18, outputs=1, **uses)
        scheduler.add(sequence)
        step(scheduler, memory)
        assert sequence.state is SequenceState.FINISHED
        return sequence.num_cached_prompt

    assert cached(1) == 0
    assert cached(1) == 16, "the base, again"
    assert cached(1, adapter=1, start=13) == 12, "the page that the start lies in is its own"
    assert cached(1, adapter=1, start=15) == 12, "and be it the page's last token"
    assert cached(1, adapter=2, start=12) == 12, "another one"
    assert cached(1, adapter=2, start=12) == 16, "the same, again"
    assert cached(1, adapter=1, start=12) == 12, "other tokens of the same adapter are adapted"
    assert cached(1, adapter=1) == 0, "on from the first token: nothing is the base's"
    assert cached(2, adapter=1, start=13) == 0, "another prompt"
    assert cached(2) == 12, "the base finds what an activated adapter left"


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
