"""The generations that have not ended: what each step brings to them, and their ends. Owned by the engine core.

A sequence ends in one place, ``end``, and everything it holds is given back there before anybody is told. A step that
was launched with it may still be under way: see ``engine/stream.py`` for why that is no danger.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Protocol

from loraplex.engine.inflight import StepResult
from loraplex.engine.messages import Failure, TokenEvent
from loraplex.engine.sampler import Drawn
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import Batch, Chunk, Origin, Sequence, SequenceState
from loraplex.errors import InternalError, LoraplexError, NonFinite
from loraplex.types import FinishReason, TokenLogprob, Usage


class AdapterHolds(Protocol):
    """Where a request's adapter versions are held."""

    def release(self, origin: Origin) -> None:
        """A request is over: its versions may go."""
        ...


class Generations:
    """Owns every sequence, and the events that nobody has been told yet. ``clock`` gives monotonic seconds."""

    def __init__(
        self,
        scheduler: Scheduler,
        holds: AdapterHolds,
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._holds = holds
        self._clock = clock
        self._sequences: dict[Origin, Sequence] = {}
        self._events: defaultdict[bytes, list[TokenEvent]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._sequences)

    def find(self, origin: Origin) -> Sequence | None:
        """A generation that has not ended."""
        return self._sequences.get(origin)

    def of_frontend(self, frontend: bytes) -> list[Origin]:
        """What one front end has asked for and not got to the end of."""
        return [origin for origin in self._sequences if origin.frontend == frontend]

    def begin(self, sequence: Sequence) -> None:
        """Queue a sequence whose adapters are held. When the queue is full it ends at once, with that error."""
        try:
            self._scheduler.add(sequence)
        except LoraplexError as error:
            self._holds.release(sequence.origin)
            self.refuse(sequence.origin, Failure.of(error))
            return
        self._sequences[sequence.origin] = sequence
        first = TokenEvent(sequence.origin.ticket, adapters=sequence.adapters, routing=sequence.uses.routing)
        self.tell(sequence.origin, first)

    def refuse(self, origin: Origin, failure: Failure) -> None:
        """A request that never became a sequence ends."""
        self.tell(origin, TokenEvent(origin.ticket, failure=failure))

    def tell(self, origin: Origin, event: TokenEvent) -> None:
        """Queue an event for whoever asked."""
        self._events[origin.frontend].append(event)

    def take_events(self) -> dict[bytes, list[TokenEvent]]:
        """Events since the last call, by front end."""
        events, self._events = self._events, defaultdict(list)
        return events

    def forget_events(self, frontend: bytes) -> None:
        """Nobody is there to be told."""
        self._events.pop(frontend, None)

    # ---- what a step brings ----

    def commit(self, batch: Batch, result: StepResult) -> None:
        """Give the sequences of a step what it brought; those that ended since its launch are passed over."""
        drawn = iter(result.drawn)
        for index, chunk in enumerate(batch.chunks):
            token = next(drawn) if chunk.sample else None
            if chunk.sequence.state is SequenceState.FINISHED:
                continue  # cancelled, or ended by the token before: nothing of this row may be seen or published
            rows = result.prompt_logprobs.get(index)
            if rows is not None:
                _collect_prompt_logprobs(chunk, rows)
            if token is not None:
                self._take(chunk, token)

    def fail(self, batch: Batch, error: Exception) -> None:
        """A step raised, which is our bug and not the callers': its sequences end, the others go on."""
        for chunk in batch.chunks:
            request_id = chunk.sequence.request.request_id
            text = f"request '{request_id}': the step failed ({type(error).__name__}); the log has more under this id"
            self.end(chunk.sequence, failure=Failure.of(InternalError(text)))

    def end(
        self,
        sequence: Sequence,
        *,
        finish: FinishReason | None = None,
        failure: Failure | None = None,
        event: TokenEvent | None = None,
    ) -> None:
        """The one place where a sequence ends: everything it holds is given back before anyone is told."""
        if sequence.state is SequenceState.FINISHED:
            return
        self._scheduler.finish(sequence)
        self._holds.release(sequence.origin)
        del self._sequences[sequence.origin]
        last = event or TokenEvent(sequence.origin.ticket)
        self.tell(
            sequence.origin,
            TokenEvent(
                last.ticket,
                token_ids=last.token_ids,
                logprobs=last.logprobs,
                prompt_logprobs=last.prompt_logprobs,
                finish=finish,
                failure=failure,
                usage=self._usage(sequence),
            ),
        )

    def _take(self, chunk: Chunk, drawn: Drawn) -> None:
        sequence = chunk.sequence
        if drawn.token_id < 0:
            self.end(sequence, failure=Failure.of(_non_finite(sequence)))
            return
        # up to here and no further: a later step that is under way has not been found finite yet
        self._scheduler.publish(sequence, chunk.start + chunk.count)
        sequence.append(drawn.token_id)
        if sequence.num_outputs == 1:
            sequence.first_token_s = self._clock()
            event = TokenEvent(
                sequence.origin.ticket,
                token_ids=(drawn.token_id,),
                logprobs=(drawn.logprob,) if drawn.logprob else (),
                prompt_logprobs=tuple(sequence.prompt_logprobs),
                usage=self._usage(sequence),
            )
        else:
            logprobs = (drawn.logprob,) if drawn.logprob else ()
            event = TokenEvent(sequence.origin.ticket, token_ids=(drawn.token_id,), logprobs=logprobs)
        finish = _finish_reason(sequence, drawn.token_id)
        if finish is None:
            self.tell(sequence.origin, event)
        else:
            self.end(sequence, finish=finish, event=event)

    def _usage(self, sequence: Sequence) -> Usage:
        now, arrival = self._clock(), sequence.arrival_s
        return Usage(
            prompt_tokens=sequence.prompt_len,
            cached_prompt_tokens=max(sequence.num_cached_prompt, 0),
            completion_tokens=sequence.num_outputs,
            queue_s=(sequence.admitted_s or now) - arrival,
            ttft_s=(sequence.first_token_s or now) - arrival,
            total_s=now - arrival,
        )


def _finish_reason(sequence: Sequence, token_id: int) -> FinishReason | None:
    stop = sequence.request.stop
    if sequence.num_outputs >= stop.min_tokens and (
        token_id in stop.stop_token_ids or (not stop.ignore_eos and token_id in sequence.eos_token_ids)
    ):
        return FinishReason.STOP
    return FinishReason.LENGTH if len(sequence.token_ids) >= sequence.max_tokens else None


def _collect_prompt_logprobs(chunk: Chunk, rows: Iterable[TokenLogprob]) -> None:
    """Keep each position once: a preempted sequence computes its prompt again."""
    known = len(chunk.sequence.prompt_logprobs)
    for position, row in enumerate(rows, start=chunk.start):
        if position >= known:
            chunk.sequence.prompt_logprobs.append(row)


def _non_finite(sequence: Sequence) -> NonFinite:
    names = ", ".join(f"'{adapter.name}'" for adapter in sequence.adapters) or "none (the base model)"
    return NonFinite(
        f"request '{sequence.request.request_id}': logits turned non-finite at token {sequence.num_tokens}; "
        f"adapters: {names}"
    )
