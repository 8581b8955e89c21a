"""The engine in the caller's own thread: for offline batches, benchmarks and tests. No sockets, no second process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from loraplex.engine.core import EngineCore
from loraplex.engine.messages import (
    Abort,
    Failure,
    GetAdapter,
    ListAdapters,
    LoadAdapter,
    Outputs,
    PinAdapter,
    Reply,
    StepReport,
    Submit,
    ToEngine,
    TokenEvent,
    UnloadAdapter,
)
from loraplex.types import (
    AdapterInfo,
    FinishReason,
    OnConflict,
    Request,
    ResolvedAdapter,
    TokenLogprob,
    UnloadMode,
    Usage,
)

_ME: Final = b"local"
#: seconds between looks at the loader's thread while nothing else is to do
_IDLE_S: Final = 0.001


@dataclass(slots=True)
class Generation:
    """One request's answer so far. Over when ``finish`` or ``failure`` is set."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    adapters: tuple[ResolvedAdapter, ...] = ()
    finish: FinishReason | None = None
    failure: Failure | None = None
    usage: Usage = field(default_factory=Usage)
    num_endings: int = 0

    @property
    def over(self) -> bool:
        return self.num_endings > 0

    def take(self, event: TokenEvent) -> None:
        """Add what an event brings."""
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs
        self.adapters = event.adapters or self.adapters
        if event.terminal:
            self.num_endings += 1
            self.finish, self.failure = event.finish, event.failure
            self.usage = event.usage or self.usage


class LocalEngine:
    """Drives a core. ``reports`` collects every step's report."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.generations: dict[int, Generation] = {}
        self.reports: list[StepReport] = []
        self._replies: dict[int, Reply] = {}
        self._counter = itertools.count(1)

    def submit(self, request: Request) -> int:
        """Begin a generation; returns its ticket."""
        ticket = next(self._counter)
        self.generations[ticket] = Generation(request)
        self.core.handle(_ME, Submit(ticket, request))
        return ticket

    def abort(self, ticket: int) -> None:
        """End a generation."""
        self.core.handle(_ME, Abort((ticket,)))

    def turn(self) -> None:
        """One turn of the core, and what it says."""
        self.core.turn()
        to_each, to_all = self.core.take_outputs()
        for message in [*to_all, *to_each.get(_ME, ())]:
            if isinstance(message, Outputs):
                if message.report is not None:
                    self.reports.append(message.report)
                for event in message.events:
                    self.generations[event.ticket].take(event)
            elif isinstance(message, Reply):
                self._replies[message.op] = message

    def generate(self, requests: Iterable[Request]) -> list[Generation]:
        """Run requests to their end, together."""
        tickets = [self.submit(request) for request in requests]
        self.run_until_idle()
        return [self.generations.pop(ticket) for ticket in tickets]

    def run_until_idle(self) -> None:
        """Turn until every generation is over."""
        while not all(g.over for g in self.generations.values()):
            self.turn()
            if not self.core.has_work:
                time.sleep(_IDLE_S)

    def load_adapter(self, name: str, source: str, on_conflict: OnConflict = OnConflict.FAIL) -> AdapterInfo:
        """Returns when it can be served; raises what the load failed for."""
        return self._operate(LoadAdapter(self.begin_op(), name, source, on_conflict=on_conflict))

    def unload_adapter(self, name: str, mode: UnloadMode = UnloadMode.DRAIN) -> AdapterInfo:
        """Returns when its last request is over."""
        return self._operate(UnloadAdapter(self.begin_op(), name, mode))

    def pin_adapter(self, name: str, pinned: bool) -> AdapterInfo:
        """Keep it on the device, or no longer."""
        return self._operate(PinAdapter(self.begin_op(), name, pinned))

    def get_adapter(self, name: str) -> AdapterInfo:
        """One adapter as it stands."""
        return self._operate(GetAdapter(self.begin_op(), name))

    def list_adapters(self) -> tuple[AdapterInfo, ...]:
        """All adapters, by name."""
        op = self.begin_op()
        return self.wait(op, ListAdapters(op)).adapters

    def begin_op(self) -> int:
        """A fresh number for an operation."""
        return next(self._counter)

    def wait(self, op: int, message: ToEngine) -> Reply:
        """Send a command and turn until its Reply; raises its failure."""
        self.core.handle(_ME, message)
        while op not in self._replies:
            self.turn()
            if not self.core.has_work:
                time.sleep(_IDLE_S)
        reply = self._replies.pop(op)
        if reply.failure is not None:
            raise reply.failure.to_error()
        return reply

    def _operate(self, message: LoadAdapter | UnloadAdapter | PinAdapter | GetAdapter) -> AdapterInfo:
        return self.wait(message.op, message).adapters[0]
