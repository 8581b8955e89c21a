"""Counts the calls in progress, and refuses new ones while there is no engine, and once the server drains."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final

from loraplex.errors import OverCapacity, Unavailable

_RETRY_AFTER_S: Final = 1.0


class Gate:
    """Every call that does work passes through ``enter``. Owned by the server's event loop."""

    def __init__(self, max_inside: int) -> None:
        self._max_inside = max_inside
        self._num_inside = 0
        self._closed_because = ""
        self._shut_because = ""
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_inside(self) -> int:
        """Calls in progress."""
        return self._num_inside

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Be counted for as long as the call does work.

        Raises Unavailable while the gate is shut and once it is closed, OverCapacity when too many are inside.
        """
        if because := self._closed_because or self._shut_because:
            raise Unavailable(because, retry_after_s=_RETRY_AFTER_S)
        if self._num_inside >= self._max_inside:
            raise OverCapacity(
                f"{self._num_inside} calls are in progress, at most {self._max_inside} are allowed; retry later",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._num_inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._empty.set()

    def close(self, because: str) -> None:
        """Let nobody in any more; the first reason stays."""
        self._closed_because = self._closed_because or because

    def shut(self, because: str) -> None:
        """Let nobody in until it is opened."""
        self._shut_because = because

    def open(self) -> None:
        """Let calls in again, unless it is closed."""
        self._shut_because = ""

    async def wait_empty(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; False when that took longer than ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
