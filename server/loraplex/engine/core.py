"""The engine without its sockets: commands in, steps run, messages out. Owned by one loop; nothing here is locked.

``handle`` takes a command, ``turn`` does everything that is due (finished loads, a slice of uploads, one step), and
``take_outputs`` hands over what there is to say. A Batch that raises is our bug: its sequences fail INTERNAL, alone.
"""

from __future__ import annotations

import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import msgspec

from loraplex.engine.desk import AdapterDesk
from loraplex.engine.messages import (
    HEARTBEAT_S,
    Abort,
    Failure,
    GetAdapter,
    Hello,
    ListAdapters,
    LoadAdapter,
    Outputs,
    Reply,
    Shutdown,
    StepReport,
    Submit,
    ToEngine,
    ToFrontEnd,
    TokenEvent,
    UnloadAdapter,
)
from loraplex.engine.runner import Runner, StepResult
from loraplex.engine.sampler import Drawn
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import Batch, Chunk, Origin, Sequence, SequenceState
from loraplex.errors import InternalError, InvalidRequest, LoraplexError, NonFinite
from loraplex.types import FinishReason, ModelInfo, Request, ResolvedAdapter, TokenLogprob, Usage

log = logging.getLogger("loraplex.engine")

#: consecutive steps that may raise before the engine gives itself up
_MAX_FAILED_STEPS: Final = 8
#: seconds between the adapters' gauges under load
_GAUGES_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class CoreParts:
    """What a core is made of."""

    runner: Runner
    scheduler: Scheduler
    desk: AdapterDesk
    model_info: ModelInfo


class EngineCore:
    """Owns every sequence. ``clock`` gives monotonic seconds."""

    def __init__(self, parts: CoreParts, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.model_info = parts.model_info
        self._runner = parts.runner
        self._scheduler = parts.scheduler
        self._desk = parts.desk
        self._clock = clock
        self._sequences: dict[Origin, Sequence] = {}
        self._to_each: defaultdict[bytes, list[ToFrontEnd]] = defaultdict(list)
        self._to_all: list[ToFrontEnd] = []
        self._events: defaultdict[bytes, list[TokenEvent]] = defaultdict(list)
        self._random = random.SystemRandom()
        self._last_report_s = self._last_gauges_s = clock()
        self._failed_steps = 0

    @property
    def has_work(self) -> bool:
        """Whether ``turn`` has something to do now."""
        return self._scheduler.has_work or self._desk.has_work

    @property
    def num_sequences(self) -> int:
        """Generations that have not ended."""
        return len(self._sequences)

    # ---- commands ----

    def handle(self, frontend: bytes, message: ToEngine) -> None:
        """Take one command. Whatever it says, nothing is raised: failures are answered."""
        try:
            self._take_command(frontend, message)
        except Exception as error:
            log.exception("command %s failed", type(message).__name__)
            failure = Failure.of(InternalError(f"{type(message).__name__} failed: {type(error).__name__}"))
            if isinstance(message, Submit):
                self._events[frontend].append(TokenEvent(message.ticket, failure=failure))
            elif not isinstance(message, Abort | Hello | Shutdown):
                self._to_each[frontend].append(Reply(message.op, failure=failure))

    def _take_command(self, frontend: bytes, message: ToEngine) -> None:
        match message:
            case Submit(ticket, request):
                self._submit(Origin(frontend, ticket), request)
            case Abort(tickets):
                for ticket in tickets:
                    self._cancel(Origin(frontend, ticket))
            case LoadAdapter():
                self._desk.load(frontend, message)
            case UnloadAdapter():
                for origin in self._desk.unload(frontend, message):
                    self._cancel(origin)
            case ListAdapters(op):
                self._desk.answer_all(frontend, op)
            case GetAdapter(op, name):
                self._desk.answer_one(frontend, op, name)
            case _:
                log.warning("unexpected command %s", type(message).__name__)

    def drop_frontend(self, frontend: bytes) -> None:
        """A front end is gone: its generations end and nothing more is said to it."""
        for origin in [o for o in self._sequences if o.frontend == frontend]:
            self._cancel(origin)
        self._desk.drop_frontend(frontend)
        self._to_each.pop(frontend, None)
        self._events.pop(frontend, None)

    def _submit(self, origin: Origin, request: Request) -> None:
        try:
            self._check(request)
            handles = self._desk.acquire(origin, request)
        except LoraplexError as error:
            self._events[origin.frontend].append(TokenEvent(origin.ticket, failure=Failure.of(error)))
            return
        if handles is None:
            return  # parked until its adapter has loaded; the desk brings it back
        seed = request.sampling.seed
        resolved = tuple(
            ResolvedAdapter(ref.name, handle.uid, ref.weight)
            for handle, ref in zip(handles, request.adapters, strict=True)
        )
        sequence = Sequence(
            origin, request, resolved, self._random.getrandbits(63) if seed is None else seed, self._clock()
        )
        try:
            self._scheduler.add(sequence)
        except LoraplexError as error:
            self._desk.release(origin)
            self._events[origin.frontend].append(TokenEvent(origin.ticket, failure=Failure.of(error)))
            return
        self._sequences[origin] = sequence
        self._events[origin.frontend].append(TokenEvent(origin.ticket, adapters=resolved))

    def _check(self, request: Request) -> None:
        prompt, room = len(request.prompt_token_ids), self.model_info.max_model_len
        if not 0 < prompt < room:
            raise InvalidRequest(
                f"request '{request.request_id}': prompt has {prompt} tokens, allowed are 1 to {room - 1}",
                field="prompt",
            )

    def _cancel(self, origin: Origin) -> None:
        if self._desk.unpark(origin):
            self._events[origin.frontend].append(
                TokenEvent(origin.ticket, finish=FinishReason.CANCELLED, usage=Usage())
            )
            return
        sequence = self._sequences.get(origin)
        if sequence is not None:
            self._end(sequence, finish=FinishReason.CANCELLED)

    # ---- the turn ----

    def turn(self) -> None:
        """Do what is due: finished loads, parked requests, uploads, one step, the report."""
        turn = self._desk.turn()
        for origin, request in turn.ready:
            self._submit(origin, request)
        for sequence, error in turn.failed:
            self._end(sequence, failure=Failure.of(error))
        batch = self._scheduler.schedule() if self._scheduler.has_work else Batch()
        if batch.chunks:
            self._step(batch)
        elif self._clock() - self._last_report_s >= HEARTBEAT_S:
            self._report(StepReport())

    def _step(self, batch: Batch) -> None:
        start = self._clock()
        for chunk in batch.chunks:
            chunk.sequence.admitted_s = chunk.sequence.admitted_s or start
        try:
            result = self._runner.run(batch)
        except Exception as error:
            self._fail_batch(batch, error)
            return
        self._failed_steps = 0
        self._commit(batch, result)
        prefill = sum(c.count for c in batch.chunks if c.start + c.count <= c.sequence.prompt_len)
        self._report(
            StepReport(
                step_s=self._clock() - start,
                prefill_tokens=prefill,
                decode_tokens=batch.num_tokens - prefill,
                sequences=len(batch.chunks),
                adapters=len({adapter.uid for c in batch.chunks for adapter in c.sequence.adapters}),
            )
        )

    def _fail_batch(self, batch: Batch, error: Exception) -> None:
        """Our bug, not the callers': fail this batch's sequences, keep the others, and give up if it goes on."""
        self._failed_steps += 1
        ids = ", ".join(chunk.sequence.request.request_id for chunk in batch.chunks)
        log.exception("step failed; requests %s", ids)
        for chunk in batch.chunks:
            request_id = chunk.sequence.request.request_id
            text = f"request '{request_id}': the step failed ({type(error).__name__}); the log has more under this id"
            self._end(chunk.sequence, failure=Failure.of(InternalError(text)))
        if self._failed_steps >= _MAX_FAILED_STEPS:
            raise InternalError(f"{self._failed_steps} steps in a row failed") from error

    def _commit(self, batch: Batch, result: StepResult) -> None:
        self._scheduler.computed(batch)
        drawn = iter(result.drawn)
        for index, chunk in enumerate(batch.chunks):
            sequence = chunk.sequence
            self._collect_prompt_logprobs(chunk, result.prompt_logprobs.get(index, ()))
            if chunk.sample:
                self._take(sequence, next(drawn))

    def _collect_prompt_logprobs(self, chunk: Chunk, rows: Iterable[TokenLogprob]) -> None:
        """Keep each position once: a preempted sequence computes its prompt again."""
        known = len(chunk.sequence.prompt_logprobs)
        for position, row in enumerate(rows, start=chunk.start):
            if position >= known:
                chunk.sequence.prompt_logprobs.append(row)

    def _take(self, sequence: Sequence, drawn: Drawn) -> None:
        if drawn.token_id < 0:
            self._end(sequence, failure=Failure.of(_non_finite(sequence)))
            return
        first = not sequence.num_outputs
        if first:
            sequence.first_token_s = self._clock()
        self._scheduler.publish(sequence)
        sequence.append(drawn.token_id)
        event = TokenEvent(
            sequence.origin.ticket,
            token_ids=(drawn.token_id,),
            logprobs=(drawn.logprob,) if drawn.logprob else (),
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first else (),
            usage=self._usage(sequence) if first else None,
        )
        finish = self._finish_reason(sequence, drawn.token_id)
        if finish is None:
            self._events[sequence.origin.frontend].append(event)
        else:
            self._end(sequence, finish=finish, event=event)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        stop = sequence.request.stop
        if sequence.num_outputs >= stop.min_tokens and (
            token_id in stop.stop_token_ids or (not stop.ignore_eos and token_id in self.model_info.eos_token_ids)
        ):
            return FinishReason.STOP
        if sequence.num_outputs >= stop.max_tokens or sequence.num_tokens >= self.model_info.max_model_len:
            return FinishReason.LENGTH
        return None

    def _end(
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
        self._desk.release(sequence.origin)
        del self._sequences[sequence.origin]
        last = event or TokenEvent(sequence.origin.ticket)
        self._events[sequence.origin.frontend].append(
            TokenEvent(
                last.ticket,
                token_ids=last.token_ids,
                logprobs=last.logprobs,
                prompt_logprobs=last.prompt_logprobs,
                finish=finish,
                failure=failure,
                usage=self._usage(sequence),
            )
        )

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

    # ---- what there is to say ----

    def take_outputs(self) -> tuple[dict[bytes, list[ToFrontEnd]], list[ToFrontEnd]]:
        """Messages for each front end, and messages for all; the caller sends the latter first."""
        for frontend, events in self._events.items():
            self._to_each[frontend].append(Outputs(events=tuple(events)))
        self._events.clear()
        for frontend, message in self._desk.take_replies():
            self._to_each[frontend].append(message)
        to_each, self._to_each = dict(self._to_each), defaultdict(list)
        to_all, self._to_all = self._desk.take_changes() + self._to_all, []
        return to_each, to_all

    def _report(self, step: StepReport) -> None:
        now = self._clock()
        scheduler, pages = self._scheduler, self._scheduler.pages
        gauges = None
        if not step.sequences or now - self._last_gauges_s >= _GAUGES_S:
            gauges = self._desk.gauges(scheduler.running, scheduler.waiting)
            self._last_gauges_s = now
        self._last_report_s = now
        report = msgspec.structs.replace(
            step,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + self._desk.num_parked,
            kv_pages_used=pages.num_held,
            kv_pages_cached=pages.num_cached,
            kv_pages_free=pages.num_available - pages.num_cached,
            preemptions=scheduler.num_preemptions,
            upload_s=self._desk.take_uploads(),
            gauges=gauges,
        )
        self._to_all.append(Outputs(report=report))


def _non_finite(sequence: Sequence) -> NonFinite:
    names = ", ".join(f"'{adapter.name}'" for adapter in sequence.adapters) or "none (the base model)"
    return NonFinite(
        f"request '{sequence.request.request_id}': logits turned non-finite at token {sequence.num_tokens}; "
        f"adapters: {names}"
    )
