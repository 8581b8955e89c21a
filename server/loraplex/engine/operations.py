"""Operations on adapters that are answered later: who asked, and what they wait for. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.adapters.registry import AdapterHandle, LoadTicket
from loraplex.engine.loader import LoadResult
from loraplex.types import ResidentMode


@dataclass(slots=True)
class PendingLoad:
    """A load in progress: who asked, and, once its files are read, what came of them."""

    frontend: bytes
    op: int
    ticket: LoadTicket
    resident_mode: ResidentMode = ResidentMode.AUTO
    result: LoadResult | None = None


@dataclass(slots=True)
class PendingUnload:
    """An unload that waits for the version's last request."""

    frontend: bytes
    op: int
    handle: AdapterHandle
