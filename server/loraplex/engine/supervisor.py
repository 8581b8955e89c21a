"""An engine that is started anew when it dies, with the adapters that it had.

What ran on it has failed by then (Unavailable, once each). While a new one comes up every call is refused so that a
client tries again; one that keeps dying is given up. Runs in the front end's asyncio loop and is touched by it alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

from loraplex.engine.client import EngineClient
from loraplex.engine.messages import StepReport, TokenEvent
from loraplex.errors import LoraplexError
from loraplex.types import AdapterInfo, AdapterState, ModelInfo, OnConflict, Request, UnloadMode

log = logging.getLogger("loraplex.supervisor")

#: seconds in which deaths are counted together
WINDOW_S: Final = 60.0
#: before a start that follows one that failed
_PAUSE_S: Final = 1.0
#: adapters that are loaded again at a time; an engine takes 256
_AT_ONCE: Final = 64

T = TypeVar("T")
Start = Callable[[], Awaitable[EngineClient]]
"""Starts an engine; raises the LoraplexError that it could not start for."""


class SupervisedEngine:
    """Answers ``EngineHandle`` for one engine after the other."""

    def __init__(self, engine: EngineClient, start: Start, restarts: int) -> None:
        """``engine`` is the first one; ``restarts``: within ``WINDOW_S``, the next death is for good."""
        self._start = start
        self._restarts = restarts
        self._deaths: deque[float] = deque()
        self._adapters: dict[str, AdapterInfo] = {}  # that could be served when it was last told of them
        self._report: list[Callable[[StepReport], None]] = []
        self._load: list[Callable[[float], None]] = []
        self._adapter: list[Callable[[AdapterInfo], None]] = []
        self._death: list[Callable[[str], None]] = []
        self._down: list[Callable[[str], None]] = []
        self._up: list[Callable[[], None]] = []
        self._revival: asyncio.Task[None] | None = None
        self._engine = self._watched(engine)

    # ---- what an engine does ----

    @property
    def model(self) -> ModelInfo:
        return self._engine.model

    @property
    def alive(self) -> bool:
        return self._engine.alive

    @property
    def text_spool(self) -> Path:
        return self._engine.text_spool

    @property
    def pid(self) -> int:
        """Process id of the present engine."""
        return self._engine.pid

    def generate(self, request: Request) -> AsyncGenerator[TokenEvent]:
        return self._engine.generate(request)

    async def load_adapter(
        self, name: str, source: str, pinned: bool = False, on_conflict: OnConflict = OnConflict.FAIL
    ) -> AdapterInfo:
        return await self._engine.load_adapter(name, source, pinned, on_conflict)

    async def unload_adapter(self, name: str, mode: UnloadMode = UnloadMode.DRAIN) -> AdapterInfo:
        return await self._engine.unload_adapter(name, mode)

    async def pin_adapter(self, name: str, pinned: bool) -> AdapterInfo:
        return await self._engine.pin_adapter(name, pinned)

    async def list_adapters(self) -> list[AdapterInfo]:
        return await self._engine.list_adapters()

    async def get_adapter(self, name: str) -> AdapterInfo:
        return await self._engine.get_adapter(name)

    def watch_adapters(self) -> AsyncGenerator[AdapterInfo]:
        return self._engine.watch_adapters()

    # ---- whom to tell ----

    def on_report(self, callback: Callable[[StepReport], None]) -> None:
        self._report.append(callback)

    def on_load(self, callback: Callable[[float], None]) -> None:
        self._load.append(callback)

    def on_adapter(self, callback: Callable[[AdapterInfo], None]) -> None:
        self._adapter.append(callback)

    def on_death(self, callback: Callable[[str], None]) -> None:
        self._death.append(callback)

    def on_restart(self, down: Callable[[str], None], up: Callable[[], None]) -> None:
        self._down.append(down)
        self._up.append(up)

    async def close(self) -> None:
        """End the engine, and start none."""
        if self._revival is not None:
            self._revival.cancel()
            await asyncio.gather(self._revival, return_exceptions=True)
        await self._engine.close()

    # ---- private ----

    def _watched(self, engine: EngineClient) -> EngineClient:
        engine.on_report(lambda report: _each(self._report, report))
        engine.on_load(lambda seconds: _each(self._load, seconds))
        engine.on_adapter(self._changed)
        engine.on_death(self._died)
        return engine

    def _changed(self, info: AdapterInfo) -> None:
        if info.state is AdapterState.READY:
            self._adapters[info.name] = info
        elif (known := self._adapters.get(info.name)) is not None and info.generation == known.generation:
            del self._adapters[info.name]  # it drains or is gone; a failed load, generation 0, leaves what was there
        _each(self._adapter, info)

    def _died(self, reason: str) -> None:
        now = time.monotonic()
        while self._deaths and now - self._deaths[0] > WINDOW_S:
            self._deaths.popleft()
        self._deaths.append(now)
        if len(self._deaths) > self._restarts:
            _each(self._death, reason)
            return
        log.error("the engine died (%s): starting it anew, with %d adapters", reason, len(self._adapters))
        for callback in self._down:
            callback(reason)
        if self._revival is None or self._revival.done():
            self._revival = asyncio.get_running_loop().create_task(self._revive(reason), name="engine-revival")

    async def _revive(self, reason: str) -> None:
        """Start an engine and load what the last one had, until one stands or it is given up."""
        began = time.monotonic()
        lost = list(self._adapters.values())
        while len(self._deaths) <= self._restarts:
            await self._engine.close()
            try:
                self._engine = self._watched(await self._start())
            except LoraplexError as error:
                log.error("the engine could not be started anew: %s", error)
                self._deaths.append(time.monotonic())
                if len(self._deaths) > self._restarts:
                    _each(self._death, f"{reason}; then it could not be started anew: {error}")
                await asyncio.sleep(_PAUSE_S)
                continue
            self._adapters.clear()
            await self._load_again(lost)
            if self._engine.alive:
                log.warning("the engine serves again after %.1f s", time.monotonic() - began)
                for callback in self._up:
                    callback()
                return

    async def _load_again(self, adapters: list[AdapterInfo]) -> None:
        """Load them under their names. One that cannot be loaded any more is missing, and is told of."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def load(info: AdapterInfo) -> None:
            async with gate:
                try:
                    await self._engine.load_adapter(info.name, info.source, info.pinned)
                except LoraplexError as error:
                    log.error("adapter %s could not be loaded again from %s: %s", info.name, info.source, error)

        await asyncio.gather(*map(load, adapters))


def _each(callbacks: list[Callable[[T], None]], value: T) -> None:
    for callback in callbacks:
        callback(value)
