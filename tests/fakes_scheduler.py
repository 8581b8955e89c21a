"""A scheduler without an engine: a bank that has room, memory that is modelled by what it was computed from."""

from __future__ import annotations

from loraplex.engine.scheduler import Scheduler, SchedulerLimits
from loraplex.engine.sequence import Batch, Origin, Sequence
from loraplex.engine.states import SequenceStates, StatePolicy
from loraplex.engine.uses import Active, Uses
from loraplex.state.pages import PageAllocator
from loraplex.state.slots import StateSlots
from loraplex.types import Request, ResolvedAdapter, StopRule
from loraplex_kernels.segments import Term
from loraplex_kernels.states import BLANK, StateSpan, check_spans


class RoomySlots:
    """A device bank of ``room`` adapters: acquire pins, least recently used unpinned ones make way."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.pins: dict[str, int] = {}

    def acquire(self, sequence: Sequence) -> tuple[Term, ...] | None:
        fresh = {uid for uid in sequence.uids if not self.pins.get(uid)}
        if sum(1 for count in self.pins.values() if count) + len(fresh) > self.room:
            return None
        for uid in sequence.uids:
            self.pins[uid] = self.pins.get(uid, 0) + 1
        return tuple(Term(int(on.uid[1:]), on.weight) for on in sequence.uses.active)

    def release(self, sequence: Sequence) -> None:
        for uid in sequence.uids:
            self.pins[uid] -= 1
            assert self.pins[uid] >= 0


Computed = tuple[tuple[int, ...], tuple[Active, ...], int]
"""What keys, values and states come of: tokens, the adapters that are on, and how many tokens are a prompt's."""


class Memory:
    """What pages and slots hold, each place by what it was computed from. ``limited``: tokens of a prompt are computed
    otherwise than those of an answer."""

    def __init__(self, page_size: int, num_slots: int = 0, *, limited: bool = False) -> None:
        self.page_size = page_size
        self.num_slots = num_slots
        self.limited = limited
        self.places: dict[tuple[int, int], Computed] = {}
        self.states: dict[int, Computed] = {}

    def run(self, batch: Batch) -> None:
        """Every chunk finds of its sequence's earlier tokens what it would have computed itself, and adds its own."""
        for key in [key for key in self.places if key[0] in batch.new_pages]:
            del self.places[key]
        for chunk in batch.chunks:
            sequence = chunk.sequence
            for position in range(chunk.start + chunk.count):
                place = sequence.pages[position // self.page_size], position % self.page_size
                if position < chunk.start:
                    assert self.places[place] == self._computed(sequence, position + 1)
                else:
                    self.places[place] = self._computed(sequence, position + 1)
        if self.num_slots:
            self._run_states(batch)

    def _run_states(self, batch: Batch) -> None:
        check_spans([StateSpan(c.count, c.slot, c.source, c.saves) for c in batch.chunks], self.num_slots)
        after = dict(self.states)
        for chunk in batch.chunks:
            if chunk.source == BLANK:
                assert chunk.start == 0
            else:
                assert self.states[chunk.source] == self._computed(chunk.sequence, chunk.start)
            for count, slot in (*chunk.saves, (chunk.count, chunk.slot)):
                after[slot] = self._computed(chunk.sequence, chunk.start + count)
        self.states = after

    def _computed(self, sequence: Sequence, num_tokens: int) -> Computed:
        on = tuple(active for active in sequence.uses.active if active.start < num_tokens)
        of_prompt = min(sequence.prompt_len, num_tokens) if self.limited else 0
        return tuple(sequence.token_ids[:num_tokens]), on, of_prompt


def scheduler_of(
    limits: SchedulerLimits,
    num_pages: int,
    page_size: int,
    *,
    num_slots: int = 0,
    limited: bool = False,
    adapters: RoomySlots | None = None,
) -> Scheduler:
    """A scheduler; of a model with states where there are slots for them."""
    slots = StateSlots(num_slots) if num_slots else None
    pages = PageAllocator(num_pages, page_size, on_forget=slots.forget if slots else lambda page: None)
    states = SequenceStates(slots, pages, StatePolicy(limits_prompt_steps=limited)) if slots else None
    return Scheduler(limits, pages, adapters or RoomySlots(), states)


def make(
    ticket: int,
    prompt: int = 5,
    *,
    adapter: int | None = None,
    start: int = 0,
    priority: int = 0,
    outputs: int = 4,
) -> Sequence:
    adapters = () if adapter is None else (ResolvedAdapter(f"a{adapter}", f"u{adapter}", 1.0),)
    uses = Uses(adapters, tuple(Active(a.uid, a.weight, start) for a in adapters))
    request = Request(
        f"r{ticket}",
        tuple(range(ticket * 1000, ticket * 1000 + prompt)),
        stop=StopRule(max_tokens=outputs),
        priority=priority,
    )
    return Sequence(Origin(b"f", ticket), request, uses, 0, float(ticket))


def step(scheduler: Scheduler, memory: Memory | None = None) -> Batch:
    """Run a step as the engine would: every sampled chunk yields token 7; done sequences finish."""
    batch = scheduler.schedule()
    if memory is not None:
        memory.run(batch)
    scheduler.launched(batch)
    for chunk in batch.chunks:
        if chunk.sample:
            scheduler.publish(chunk.sequence, chunk.start + chunk.count)
            chunk.sequence.append(7)
            if chunk.sequence.num_outputs >= chunk.sequence.request.stop.max_tokens:
                scheduler.finish(chunk.sequence)
    return batch
