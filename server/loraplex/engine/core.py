"""The engine without its sockets: commands in, steps run, messages out. Owned by one loop; nothing here is locked.

``handle`` takes a command, ``turn`` does everything that is due (finished loads, a slice of uploads, a step), and
``take_outputs`` hands over what there is to say. A Batch that raises is our bug: its sequences fail INTERNAL, alone.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from loraplex.engine.desk import AdapterDesk
from loraplex.engine.executor import Executor
from loraplex.engine.exports import Exports
from loraplex.engine.generations import Generations
from loraplex.engine.messages import (
    HEARTBEAT_S,
    Abort,
    CancelExport,
    ExportAdapter,
    Failure,
    GetAdapter,
    Hello,
    ListAdapters,
    LoadAdapter,
    MergeAdapters,
    Outputs,
    PinAdapter,
    Reply,
    SetResidentMode,
    Shutdown,
    StepReport,
    Submit,
    ToEngine,
    ToFrontEnd,
    TokenEvent,
    UnloadAdapter,
)
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import Origin, Sequence
from loraplex.engine.steps import Steps
from loraplex.errors import InternalError, InvalidRequest, LoraplexError
from loraplex.types import FinishReason, ModelInfo, Request, Usage

log = logging.getLogger("loraplex.engine")

#: seconds between the adapters' gauges under load
_GAUGES_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class CoreParts:
    """What a core is made of. ``running`` is set while there are sequences to run, for other threads to see."""

    executor: Executor
    scheduler: Scheduler
    desk: AdapterDesk
    exports: Exports
    model_info: ModelInfo
    running: threading.Event


class EngineCore:
    """Takes commands and gives everything its turn. ``clock`` gives monotonic seconds."""

    def __init__(self, parts: CoreParts, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.model_info = parts.model_info
        self._scheduler = parts.scheduler
        self._running = parts.running
        self._desk = parts.desk
        self._exports = parts.exports
        self._clock = clock
        self._others = parts.executor.others
        self._generations = Generations(parts.scheduler, parts.desk.holds, clock)
        self._steps = Steps(parts.executor, parts.scheduler, self._generations, report=self._report, clock=clock)
        self._to_each: defaultdict[bytes, list[ToFrontEnd]] = defaultdict(list)
        self._to_all: list[ToFrontEnd] = []
        self._random = random.SystemRandom()
        self._last_report_s = self._last_gauges_s = clock()

    @property
    def has_work(self) -> bool:
        """Whether ``turn`` has something to do now."""
        return self._steps.has_work or self._desk.has_work

    @property
    def num_sequences(self) -> int:
        """Generations that have not ended."""
        return len(self._generations)

    # ---- commands ----

    def handle(self, frontend: bytes, message: ToEngine) -> None:
        """Take one command. Whatever it says, nothing is raised: failures are answered."""
        try:
            self._take_command(frontend, message)
        except Exception as error:
            log.exception("command %s failed", type(message).__name__)
            failure = Failure.of(InternalError(f"{type(message).__name__} failed: {type(error).__name__}"))
            if isinstance(message, Submit):
                self._generations.refuse(Origin(frontend, message.ticket), failure)
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
                self._desk.loads.begin(frontend, message)
            case MergeAdapters():
                self._desk.loads.begin_merge(frontend, message)
            case UnloadAdapter():
                if (aborted := self._desk.unload(frontend, message)) is not None:
                    for origin in self._desk.holds.of(aborted):
                        self._cancel(origin)
                    self._exports.abort(aborted)
            case ExportAdapter():
                self._exports.begin(frontend, message)
            case CancelExport(op):
                self._exports.cancel(frontend, op)
            case PinAdapter():
                self._desk.set_pinned(frontend, message)
            case SetResidentMode():
                self._desk.forms.set_mode(frontend, message)
            case ListAdapters(op):
                self._desk.answer_all(frontend, op)
            case GetAdapter(op, name):
                self._desk.answer_one(frontend, op, name)
            case _:
                log.warning("unexpected command %s", type(message).__name__)

    def drop_frontend(self, frontend: bytes) -> None:
        """A front end is gone: its generations end and nothing more is said to it."""
        for origin in self._generations.of_frontend(frontend):
            self._cancel(origin)
        self._desk.holds.drop_frontend(frontend)
        self._exports.drop_frontend(frontend)
        self._to_each.pop(frontend, None)
        self._generations.forget_events(frontend)

    def _submit(self, origin: Origin, request: Request) -> None:
        try:
            self._check(request)
            uses = self._desk.holds.acquire(origin, request)
        except LoraplexError as error:
            self._generations.refuse(origin, Failure.of(error))
            return
        if uses is None:
            return  # parked until its adapter has loaded; the desk brings it back
        seed = request.sampling.seed
        if seed is None:
            seed = self._random.getrandbits(63)
        room = self.model_info.max_model_len
        self._generations.begin(Sequence(origin, request, uses, seed, self._clock(), room))

    def _check(self, request: Request) -> None:
        prompt, room = len(request.prompt_token_ids), self.model_info.max_model_len
        if not 0 < prompt < room:
            raise InvalidRequest(
                f"request '{request.request_id}': prompt has {prompt} tokens, allowed are 1 to {room - 1}",
                field="prompt",
            )

    def _cancel(self, origin: Origin) -> None:
        if self._desk.holds.unpark(origin):
            self._generations.tell(origin, TokenEvent(origin.ticket, finish=FinishReason.CANCELLED, usage=Usage()))
            return
        sequence = self._generations.find(origin)
        if sequence is not None:
            self._generations.end(sequence, finish=FinishReason.CANCELLED)

    # ---- the turn ----

    def turn(self) -> None:
        """Do what is due: finished loads, uploads, a slice of a probe, parked requests, one step, the report.

        Where steps overlap, that step is launched first, and then the one before it is taken in. Raises GroupLost.
        """
        self._exports.turn()
        turn = self._desk.turn()
        if self._desk.has_trial:
            self._steps.settle()
            self._desk.try_next()
        for origin, request in turn.ready:
            self._submit(origin, request)
        for sequence, error in turn.failed:
            self._generations.end(sequence, failure=Failure.of(error))
        if self._steps.advance():
            self._desk.forms.observe(self._scheduler.running)
        else:
            self._others.check()
            if self._clock() - self._last_report_s >= HEARTBEAT_S:
                self._report(StepReport())
        if self._scheduler.has_work:
            self._running.set()
        else:
            self._running.clear()

    def close(self, *, for_good: bool = True) -> None:
        """Nothing is run any more: end exports and the other ranks. ``for_good``: nobody starts them anew."""
        self._exports.close()
        self._others.close(for_good=for_good)

    # ---- what there is to say ----

    def take_outputs(self) -> tuple[dict[bytes, list[ToFrontEnd]], list[ToFrontEnd]]:
        """Messages for each front end, and messages for all; the caller sends the latter first."""
        for frontend, events in self._generations.take_events().items():
            self._to_each[frontend].append(Outputs(events=tuple(events)))
        for frontend, message in self._desk.answers.take_replies():
            self._to_each[frontend].append(message)
        to_each, self._to_each = dict(self._to_each), defaultdict(list)
        to_all, self._to_all = self._desk.answers.take_changes() + self._to_all, []
        return to_each, to_all

    def _report(self, step: StepReport) -> None:
        now = self._clock()
        scheduler, pages = self._scheduler, self._scheduler.pages
        gauges = None
        if not step.sequences or now - self._last_gauges_s >= _GAUGES_S:
            gauges = self._desk.gauges(scheduler.running, scheduler.waiting)
            self._last_gauges_s = now
        self._last_report_s = now
        if scheduler.states is not None:
            slots = scheduler.states.slots
            step = msgspec.structs.replace(
                step,
                state_slots_used=slots.num_held,
                state_slots_cached=slots.num_snapshots,
                state_slots_free=slots.num_slots - slots.num_held - slots.num_snapshots,
            )
        report = msgspec.structs.replace(
            step,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + self._desk.holds.num_parked,
            kv_pages_used=pages.num_held,
            kv_pages_cached=pages.num_cached,
            kv_pages_free=pages.num_available - pages.num_cached,
            preemptions=scheduler.num_preemptions,
            upload_s=self._desk.take_uploads(),
            gauges=gauges,
        )
        self._to_all.append(Outputs(report=report))
