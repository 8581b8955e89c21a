"""Sends a schedule to a server from one event loop and notes when every token came. Computes no statistics.

All times are seconds of the monotonic clock after the start of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import grpc

from bench.serve.schedule import Planned
from loraplex_client import AsyncClient, Params, ServerError, Unavailable, health

OK: Final = "OK"
#: the "code" of a request that was in flight when the load was stopped
UNFINISHED: Final = "UNFINISHED"
_PROBE_S: Final = 5.0


@dataclass(slots=True)
class Outcome:
    """One request that was sent. Filled in by the task that reads it."""

    planned: Planned
    sent_s: float
    #: a gRPC status code by name
    code: str = UNFINISHED
    message: str = ""
    #: when each chunk with tokens came, and how many it had
    chunk_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    ended_s: float = 0.0
    cached_prompt_tokens: int = 0
    #: the server's own time to first token, from the last chunk
    server_ttft_s: float | None = None
    #: the prompt held no invocation tokens of its adapter (an aLoRA), so that the base alone answered
    idle: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(self.chunk_tokens)

    @property
    def lag_s(self) -> float:
        """How late the sender was; 0 in a closed loop."""
        return 0.0 if self.planned.due_s is None else self.sent_s - self.planned.due_s


@dataclass(frozen=True, slots=True)
class Stop:
    """Why the load ended before its schedule did."""

    kind: Literal["interrupted", "time", "lost"]
    message: str


class Halt:
    """Asked for once, from a signal, a timer or a request that found the server gone. The first reason stays."""

    def __init__(self) -> None:
        self.stop: Stop | None = None
        self._event = asyncio.Event()

    def request(self, stop: Stop) -> None:
        """Stop the load."""
        self.stop = self.stop or stop
        self._event.set()

    async def wait(self) -> None:
        """Until somebody asks."""
        await self._event.wait()


@dataclass(frozen=True, slots=True)
class Played:
    """One schedule as far as it was played."""

    outcomes: tuple[Outcome, ...]
    num_planned: int
    duration_s: float
    #: CPU seconds of this process in that time
    client_cpu_s: float

    @property
    def complete(self) -> bool:
        """Whether every request was sent and ended by itself."""
        return len(self.outcomes) == self.num_planned and all(o.code != UNFINISHED for o in self.outcomes)


class Load:
    """Plays schedules against one server. Used from one event loop; ``halt`` ends a play early."""

    def __init__(self, address: str, timeout_s: float, halt: Halt) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._halt = halt
        self._client = AsyncClient(address)
        self._outcomes: list[Outcome] = []
        self._start = 0.0
        self._probe: asyncio.Task[None] | None = None

    @property
    def client(self) -> AsyncClient:
        """The connection that the requests go over."""
        return self._client

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()

    async def play(
        self, schedule: Sequence[Planned], concurrency: int | None, on_end: Callable[[Outcome], None]
    ) -> Played:
        """Send ``schedule``: when it is due, or with ``concurrency`` in flight when it says nothing of that."""
        self._outcomes = []
        cpu_start, self._start = time.process_time(), time.monotonic()
        sending = self._open(schedule, on_end) if concurrency is None else self._closed(schedule, concurrency, on_end)
        sender, halted = asyncio.create_task(sending), asyncio.create_task(self._halt.wait())
        try:
            await asyncio.wait({sender, halted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            unfinished = [task for task in (sender, halted) if not task.done()]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
        if not sender.cancelled():
            sender.result()
        duration_s = self._now()
        if self._halt.stop is None:
            duration_s = max((outcome.ended_s for outcome in self._outcomes), default=duration_s)
        return Played(tuple(self._outcomes), len(schedule), duration_s, time.process_time() - cpu_start)

    async def _open(self, schedule: Sequence[Planned], on_end: Callable[[Outcome], None]) -> None:
        async with asyncio.TaskGroup() as group:
            for planned in schedule:
                assert planned.due_s is not None
                await asyncio.sleep(planned.due_s - self._now())
                group.create_task(self._send(planned, on_end))

    async def _closed(self, schedule: Sequence[Planned], concurrency: int, on_end: Callable[[Outcome], None]) -> None:
        rest = iter(schedule)
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._send_all(rest, on_end))

    async def _send_all(self, rest: Iterator[Planned], on_end: Callable[[Outcome], None]) -> None:
        for planned in rest:
            await self._send(planned, on_end)

    async def _send(self, planned: Planned, on_end: Callable[[Outcome], None]) -> None:
        outcome = Outcome(planned, self._now())
        self._outcomes.append(outcome)
        try:
            await self._read(outcome)
            outcome.code = OK
        except ServerError as error:
            outcome.code, outcome.message = error.code.name, str(error)
            if isinstance(error, Unavailable):
                await self._still_there()
        finally:
            outcome.ended_s = outcome.ended_s or self._now()
            on_end(outcome)

    async def _read(self, outcome: Outcome) -> None:
        planned = outcome.planned
        # ids are asked for so that a chunk says how many tokens it has; a token whose text is held back is one too
        params = Params(max_tokens=planned.output_tokens, ignore_eos=True, token_ids=True)
        stream = self._client.stream(planned.prompt, params, adapters=planned.adapter, timeout=self._timeout_s)
        try:
            async with contextlib.aclosing(stream) as chunks:
                async for chunk in chunks:
                    if chunk.token_ids:
                        outcome.chunk_s.append(self._now())
                        outcome.chunk_tokens.append(len(chunk.token_ids))
                    outcome.idle = outcome.idle or any(not use.invoked for use in chunk.adapters)
                    if chunk.usage is not None:
                        outcome.cached_prompt_tokens = chunk.usage.cached_prompt_tokens
                        outcome.server_ttft_s = chunk.usage.ttft_s
        finally:
            outcome.ended_s = self._now()

    async def _still_there(self) -> None:
        """Stop the load when the server is gone, so that the rest of the schedule is not burnt on it."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._ask_health())
        await asyncio.shield(self._probe)

    async def _ask_health(self) -> None:
        try:
            status = await asyncio.to_thread(health.check, self._address, timeout_s=_PROBE_S)
        except grpc.RpcError as error:
            status = error.code().name if isinstance(error, grpc.Call) else "UNAVAILABLE"
        if status != "SERVING":
            self._halt.request(Stop("lost", f"the server at {self._address} was lost: its health is {status}"))

    def _now(self) -> float:
        return time.monotonic() - self._start
