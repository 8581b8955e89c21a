"""What the front end asks of an engine. ``engine/client.py`` answers it for a process; tests answer it with a fake."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Protocol

from loraplex.engine.messages import StepReport, TokenEvent
from loraplex.types import AdapterInfo, ModelInfo, OnConflict, Request, UnloadMode


class EngineHandle(Protocol):
    """A running engine, used from one event loop."""

    @property
    def model(self) -> ModelInfo:
        """What it serves."""
        ...

    @property
    def alive(self) -> bool:
        """Whether there is one now."""
        ...

    @property
    def text_spool(self) -> Path:
        """Where adapters' own text is kept (``text/pack.py``)."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """Events of one generation; the last carries ``finish`` and ``usage``.

        ``aclose`` ends it early and frees all it holds within one step. A failure is raised as its LoraplexError.
        """
        ...

    async def load_adapter(self, name: str, source: str, pinned: bool, on_conflict: OnConflict) -> AdapterInfo:
        """Load and return when it can be served."""
        ...

    async def unload_adapter(self, name: str, mode: UnloadMode) -> AdapterInfo:
        """Unload and return when its last request is over."""
        ...

    async def pin_adapter(self, name: str, pinned: bool) -> AdapterInfo:
        """Keep it on the device, or no longer. Raises NotFound, OverCapacity: it does not fit beside what is pinned."""
        ...

    async def list_adapters(self) -> list[AdapterInfo]:
        """All adapters, by name."""
        ...

    async def get_adapter(self, name: str) -> AdapterInfo:
        """One adapter. Raises NotFound, naming the nearest."""
        ...

    def watch_adapters(self) -> AsyncGenerator[AdapterInfo]:
        """The present state of every adapter, then each change."""
        ...

    def on_report(self, callback: Callable[[StepReport], None]) -> None:
        """Call ``callback`` with every step report."""
        ...

    def on_load(self, callback: Callable[[float], None]) -> None:
        """Call ``callback`` with the seconds of every adapter load, source to servable."""
        ...

    def on_adapter(self, callback: Callable[[AdapterInfo], None]) -> None:
        """Call ``callback`` with each change of an adapter, before whoever asked for it is answered."""
        ...

    def on_death(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with the reason when the engine dies for good."""
        ...

    def on_restart(self, down: Callable[[str], None], up: Callable[[], None]) -> None:
        """Call ``down`` with the reason when the engine dies and is started anew, ``up`` when it serves again."""
        ...
