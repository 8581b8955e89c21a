"""The scheduler under any order of events: what it holds is accounted for, what it finds is what it would compute."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.engine.scheduler import SchedulerLimits
from loraplex.engine.sequence import Sequence, SequenceState
from loraplex.errors import OverCapacity
from tests.fakes_scheduler import Memory, RoomySlots, make, scheduler_of, step


class SchedulerMachine(RuleBasedStateMachine):
    """Submit, cancel, fail and step in any order, with few pages and few device slots, and with ``NUM_SLOTS`` slots of
    states, where there are any."""

    NUM_SLOTS = 0
    NUM_PAGES = 12
    LIMITED = False

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(2, self.NUM_SLOTS, limited=self.LIMITED)
        limits = SchedulerLimits(3, 6, 8)
        self.scheduler = scheduler_of(
            limits, self.NUM_PAGES, 2, num_slots=self.NUM_SLOTS, limited=self.LIMITED, adapters=RoomySlots(2)
        )
        self.live: list[Sequence] = []
        self.tickets = 0

    @rule(
        prompt=st.integers(1, 12),
        outputs=st.integers(1, 8),
        adapter=st.sampled_from([None, 1, 2, 3]),
        start=st.integers(0, 11),
        priority=st.integers(0, 1),
    )
    def submit(self, prompt: int, outputs: int, adapter: int | None, start: int, priority: int) -> None:
        self.tickets += 1
        begun = min(start, prompt - 1)
        sequence = make(self.tickets % 2, prompt, adapter=adapter, start=begun, priority=priority, outputs=outputs)
        try:
            self.scheduler.add(sequence)
        except OverCapacity:
            assert len(self.scheduler.waiting) >= 8
        else:
            self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), outputs=st.integers(1, 8))
    def follow(self, data: st.DataObject, outputs: int) -> None:
        """A prompt that is what another sequence has come to, or a part of that."""
        other = data.draw(st.sampled_from(self.live))
        tokens = other.token_ids[: data.draw(st.integers(1, min(len(other.token_ids), 18)))]
        sequence = make(0, len(tokens), outputs=min(outputs, 22 - len(tokens)))
        sequence.token_ids[:] = tokens
        try:
            self.scheduler.add(sequence)
        except OverCapacity:
            assert len(self.scheduler.waiting) >= 8
        else:
            self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.scheduler.finish(data.draw(st.sampled_from(self.live)))
        self._sweep()

    @rule()
    def fail(self) -> None:
        """A step raises: what it was to bring is nobody's, and its sequences end."""
        for chunk in self.scheduler.schedule().chunks:
            self.scheduler.finish(chunk.sequence)
        self._sweep()

    @rule()
    def step(self) -> None:
        batch = step(self.scheduler, self.memory)
        assert batch.num_tokens <= 6
        counts = [c.count for c in batch.chunks]
        assert counts == sorted(counts, key=lambda n: n > 1)
        for chunk in batch.chunks:
            if chunk.sequence.state is SequenceState.RUNNING:
                assert len(chunk.sequence.pages) * 2 >= chunk.start + chunk.count
        if self.live and not batch.num_preempted:
            assert batch.chunks, "something waits, nothing was preempted, and yet nothing ran"
        self._sweep()

    def _sweep(self) -> None:
        self.live = [s for s in self.live if s.state is not SequenceState.FINISHED]

    @invariant()
    def pages_and_slots_are_those_of_running_sequences(self) -> None:
        running = self.scheduler.running
        assert len({id(s) for s in running + self.scheduler.waiting}) == len(self.live)
        assert self.scheduler.pages.num_held == len({p for s in running for p in s.pages})
        slots = self.scheduler._slots
        assert sum(slots.pins.values()) == sum(len(s.uids) for s in running)  # type: ignore[attr-defined]

    @invariant()
    def states_are_those_of_running_sequences_and_of_known_pages(self) -> None:
        states = self.scheduler.states
        if states is None:
            return
        held = [sequence.states for sequence in self.scheduler.running]
        taken = [slot for one in held if one for slot in (one.slot, *(save.slot for save in one.saves))]
        kept = {snapshot.slot for snapshot in states.slots._snapshots.values()}
        assert len(set(taken)) == len(taken) == states.slots.num_held
        assert len(kept) == states.slots.num_snapshots
        blank = set(states.slots._blank)
        assert blank | kept | set(taken) == set(range(self.NUM_SLOTS))
        assert len(blank) + len(kept) + len(taken) == self.NUM_SLOTS
        assert states.slots._snapshots.keys() <= self.scheduler.pages._entry_of.keys()
        assert all(sequence.states is None for sequence in self.scheduler.waiting)

    def teardown(self) -> None:
        for _ in range(400):
            if not self.scheduler.has_work:
                break
            step(self.scheduler, self.memory)
        assert not self.scheduler.has_work, "it never drained"
        assert self.scheduler.pages.num_held == 0
        assert self.scheduler.states is None or self.scheduler.states.slots.num_held == 0
