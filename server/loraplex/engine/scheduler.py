"""Which tokens run in the next step. Policy only: pure Python, no tensors, no sockets, no clock of its own.

Each step: every running sequence decodes one token; what is left of the token budget goes to prefill chunks of running
sequences, then to waiting ones, best priority first and then first come, first served. When pages run out the sequence
that came last, of the lowest priority, gives its pages back and waits again (its published pages stay in the prefix
index, so that it often resumes where it was).

A step may be scheduled while the one before has not run. What is decided here depends on counts alone, and a token that
is still being drawn counts like any other; only preemption waits until nothing is in flight (``may_preempt``).

Of a model with state-space layers each running sequence has a slot of states (``engine/states.py``); there are at least
as many slots as sequences may run.

It cannot deadlock: any accepted sequence fits the cache alone, the oldest running one may take every other's pages,
and a sequence whose adapter finds no room on the device for ``STARVATION_STEPS`` steps closes admission until running
ones have drained and made room for it.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import Final, Protocol

from loraplex.engine.sequence import Batch, Chunk, RowOrder, Sequence, SequenceState
from loraplex.engine.states import SequenceStates
from loraplex.errors import OverCapacity
from loraplex.state.pages import PageAllocator, Published
from loraplex_kernels.segments import Term

#: steps that later arrivals may overtake a sequence whose adapter waits for room on the device
STARVATION_STEPS: Final = 64
#: waiting sequences in a step whose adapters may be found missing before the rest wait unasked
LOOKAHEAD: Final = 32


class AdapterSlots(Protocol):
    """The scheduler's view of the device bank."""

    def acquire(self, sequence: Sequence) -> tuple[Term, ...] | None:
        """Pin the sequence's adapters on the device and say where; None while they are not there (upload begun)."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Unpin what ``acquire`` pinned."""
        ...


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """``max_num_batched_tokens`` >= ``max_num_seqs``, so that every running sequence can decode in every step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int


def _order(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.order


class Scheduler:
    """Owns the waiting and running sequences and their pages. Touched by the engine loop alone."""

    def __init__(
        self,
        limits: SchedulerLimits,
        pages: PageAllocator,
        slots: AdapterSlots,
        states: SequenceStates | None = None,
    ) -> None:
        """``states``: of the same pages; None: the model has no state-space layers."""
        if limits.max_num_batched_tokens < limits.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {limits.max_num_batched_tokens} is less than "
                f"max_num_seqs {limits.max_num_seqs}: not every running sequence could decode in a step"
            )
        self.limits = limits
        self.pages = pages
        self.waiting: list[Sequence] = []  # best first
        self.running: list[Sequence] = []  # best first
        self.num_preemptions = 0
        self._slots = slots
        self.states = states
        self._arrivals = 0
        self._starving: Sequence | None = None  # the first that found no room on the device
        self._starved_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Accept a sequence. Raises OverCapacity when the queue is full."""
        if len(self.waiting) >= self.limits.max_waiting:
            raise OverCapacity(
                f"request '{sequence.request.request_id}': {len(self.waiting)} requests wait already, "
                f"the limit is {self.limits.max_waiting} (--max-waiting)",
                retry_after_s=1.0,
            )
        self._arrivals += 1
        sequence.order = (-sequence.request.priority, sequence.arrival_s, self._arrivals)
        insort(self.waiting, sequence, key=_order)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, in whatever state it is, and give back all it holds."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED

    def schedule(self) -> Batch:
        """The next step's batch; empty when nothing can run now."""
        batch = Batch()
        if self.states is not None:
            self.states.begin_step()
        budget = self.limits.max_num_batched_tokens
        going_on = [s for s in self.running if not s.is_full]
        decoding = [s for s in going_on if s.num_tokens - s.num_computed == 1]
        prefilling = [s for s in going_on if s.num_tokens - s.num_computed > 1]
        for sequence in decoding + prefilling:
            if sequence.state is SequenceState.RUNNING and budget > 0:
                budget -= self._extend(sequence, budget, batch)
        if not batch.num_preempted:
            self._admit(batch, budget)
        batch.chunks = [c for c in batch.chunks if c.sequence.state is SequenceState.RUNNING]
        batch.chunks.sort(key=_row_order)
        return batch

    def may_preempt(self) -> bool:
        """Whether the next ``schedule`` could run out of pages, so that no step should be in flight then.

        A sequence that is about to end may have the very pages that another is preempted for; and one whose token is
        still unknown could not say what it has to compute again.
        """
        budget, size = self.limits.max_num_batched_tokens, self.pages.page_size
        available = self.pages.num_available
        if available >= len(self.running) + budget // size:
            return False
        for sequence in self.running:
            if not sequence.is_full:
                end = min(sequence.num_tokens, sequence.num_computed + budget)
                available -= max(self.pages.pages_for(end) - len(sequence.pages), 0)
        return available < 0

    def launched(self, batch: Batch) -> None:
        """The batch runs: its tokens count as computed, and those it draws as unknown."""
        for chunk in batch.chunks:
            chunk.sequence.num_computed = chunk.start + chunk.count
            if chunk.sample:
                chunk.sequence.num_unknown += 1

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others find the full pages of a sequence's first tokens, and the states that were saved behind some. Call
        only after their logits were finite."""
        size, states = self.pages.page_size, sequence.states
        num_tokens = min(num_tokens, self._shareable(sequence))
        if num_tokens // size <= sequence.published.num_pages:
            return
        known = sequence.token_ids[:num_tokens]
        asked = () if states is None else [save.num_tokens // size for save in states.saves]
        found = self.pages.publish(sequence.lineage, known, sequence.pages, sequence.published, asked)
        if self.states is not None:
            self.states.publish(sequence, num_tokens, found)

    def _shareable(self, sequence: Sequence) -> int:
        return sequence.num_tokens if self.states is None else self.states.shareable(sequence)

    def _extend(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        """Give a running sequence its next tokens, preempting others for pages if it must. Returns tokens used."""
        count = min(sequence.num_tokens - sequence.num_computed, budget)
        missing = self.pages.pages_for(sequence.num_computed + count) - len(sequence.pages)
        if missing > 0:
            while (fresh := self.pages.take(missing)) is None:
                victim = self.running[-1]
                self._preempt(victim, batch)
                if victim is sequence:
                    return 0
            sequence.pages += fresh
            batch.new_pages += fresh
        batch.chunks.append(self._chunk(sequence, count))
        return count

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        start = sequence.num_computed
        if self.states is None:
            return Chunk(sequence, start, count, sample=start + count == sequence.num_tokens)
        one_waits = bool(self.waiting) and len(self.running) < self.limits.max_num_seqs
        return self.states.chunk(sequence, count, leave=int(one_waits))

    def _preempt(self, sequence: Sequence, batch: Batch) -> None:
        assert sequence.num_unknown == 0, "preempted with a step in flight: may_preempt() was not heeded"
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.num_computed = 0
        sequence.state = SequenceState.WAITING
        insort(self.waiting, sequence, key=_order)
        batch.num_preempted += 1
        self.num_preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages = []
        if self.states is not None:
            self.states.give_back(sequence)
        self._slots.release(sequence)
        sequence.terms = ()

    def _admit(self, batch: Batch, budget: int) -> None:
        closed_behind = self._starving_too_long()
        absent = 0
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.limits.max_num_seqs:
                break
            terms = self._slots.acquire(sequence)
            if terms is None:
                self._starving = self._starving or sequence
                absent += 1
                if sequence is closed_behind or absent == LOOKAHEAD:
                    break
                continue
            cached = self._take_prompt_pages(sequence, batch)
            if cached is None:
                self._slots.release(sequence)
                break
            sequence.terms = terms
            sequence.row_order = (tuple((term.slot, term.weight) for term in terms), sequence.order)
            self._start(sequence, cached)
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            batch.chunks.append(self._chunk(sequence, count))
            budget -= count

    def _starving_too_long(self) -> Sequence | None:
        """The sequence that has waited too long for room on the device, if there is one."""
        if self._starving is None or self._starving.state is not SequenceState.WAITING:
            self._starving, self._starved_steps = None, 0
            return None
        self._starved_steps += 1
        return self._starving if self._starved_steps >= STARVATION_STEPS else None

    def _take_prompt_pages(self, sequence: Sequence, batch: Batch) -> int | None:
        """Hold the cached prefix, and take a slot of states and blank pages for the rest. Returns cached tokens; None:
        not enough of either."""
        known = self._known(sequence)
        shared = known if self.states is None else self.states.restorable(known)
        missing = self.pages.pages_for(sequence.num_tokens) - len(shared)
        if missing > self.pages.num_available - self.pages.num_cached_in(shared):
            return None
        if self.states is not None and not self.states.admit(sequence, shared, len(known)):
            return None
        self.pages.hold(shared)
        fresh = self.pages.take(missing)
        assert fresh is not None, "availability was checked"
        sequence.pages = shared + fresh
        batch.new_pages += fresh
        return len(shared) * self.pages.page_size

    def _known(self, sequence: Sequence) -> list[int]:
        """Pages of the index that hold its first tokens, all but one at least of those it has to compute."""
        if sequence.request.output.prompt_logprobs:
            return []  # every row is wanted
        return self.pages.match(sequence.lineage, sequence.token_ids[: self._shareable(sequence) + 1])

    def _start(self, sequence: Sequence, num_cached: int) -> None:
        self.waiting.remove(sequence)
        sequence.state = SequenceState.RUNNING
        sequence.num_computed = num_cached
        sequence.published = Published()
        if sequence.num_cached_prompt < 0:
            sequence.num_cached_prompt = min(num_cached, sequence.prompt_len)
        insort(self.running, sequence, key=_order)


def _row_order(chunk: Chunk) -> tuple[bool, RowOrder]:
    return (chunk.count > 1, chunk.sequence.row_order)
