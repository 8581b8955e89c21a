"""Between the engine's events and a gRPC stream: a bounded buffer, so that a slow reader holds nothing in the engine.

``EventFeed`` reads events as they come; ``StreamWriter`` sends messages and notices a reader that makes no progress.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Final

from google.protobuf.message import Message

from loraplex.engine.messages import TokenEvent
from loraplex.errors import OverCapacity
from loraplex.rpc.status import Context, sending

#: a stream whose reader takes nothing for this long is ended
STALL_S: Final = 30.0
#: and so is one that takes nothing for this long while more than this much has piled up
LAG_S: Final = 1.0
MAX_BUFFERED_BYTES: Final = 256 << 10
#: wire bytes of one token or one logprob candidate, roughly
_ENTRY_BYTES: Final = 32


class StreamWriter:
    """Writes messages to one stream."""

    def __init__(self, context: Context, stall_s: float = STALL_S) -> None:
        self._context = context
        self._stall_s = stall_s
        self._timeout: asyncio.Timeout | None = None
        self._write_began = 0.0
        self._stalled = False

    async def open(self) -> None:
        """Send the headers. Before the first write: a status cannot follow a first write that was given up."""
        with sending():
            await self._context.send_initial_metadata(())

    async def write(self, message: Message) -> None:
        """Send one message. Raises OverCapacity when the reader stalls."""
        if self._stalled:
            raise _stalled()
        self._write_began = asyncio.get_running_loop().time()
        try:
            with sending():
                async with asyncio.timeout(self._stall_s) as self._timeout:
                    await self._context.write(message)
        except TimeoutError:
            raise _stalled() from None
        finally:
            self._timeout = None

    @property
    def lags(self) -> bool:
        """Whether a write has been waiting for its reader for ``LAG_S``."""
        return self._timeout is not None and asyncio.get_running_loop().time() - self._write_began > LAG_S

    def give_up(self) -> None:
        """End a write in progress, and all later ones, as stalled."""
        self._stalled = True
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time())


class EventFeed:
    """Reads one generation's events into a bounded buffer, in a task of its own.

    When the buffer is full and ``writer`` lags, it ends the generation first and gives the writer up then.
    """

    def __init__(self, events: AsyncGenerator[TokenEvent], writer: StreamWriter) -> None:
        self._writer = writer
        self._buffer: list[TokenEvent] = []
        self._num_bytes = 0
        self._ended = False
        self._error: Exception | None = None
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._read(events))

    async def ready(self) -> list[TokenEvent]:
        """Every event that has come since the last call, at least one; empty after the last. Raises what ended it."""
        await self._wake.wait()
        if self._buffer:
            events, self._buffer = self._buffer, []
            self._num_bytes = 0
            if not self._ended:
                self._wake.clear()
            return events
        if self._error is not None:
            raise self._error
        return []

    async def close(self) -> None:
        """End the generation if it still runs; returns when the engine has been told."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _read(self, events: AsyncGenerator[TokenEvent]) -> None:
        overflow = False
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    self._buffer.append(event)
                    self._num_bytes += _size(event)
                    overflow = self._num_bytes > MAX_BUFFERED_BYTES and self._writer.lags
                    if overflow:
                        break
                    self._wake.set()
        except Exception as error:  # handed to the reader of this feed
            self._error = error
        finally:
            self._ended = True
            self._wake.set()
        if overflow:
            self._writer.give_up()


def _size(event: TokenEvent) -> int:
    entries = len(event.token_ids)
    for logprobs in (event.logprobs, event.prompt_logprobs):
        if logprobs:
            entries += sum(1 + len(item.top) for item in logprobs)
    return entries * _ENTRY_BYTES


def _stalled() -> OverCapacity:
    return OverCapacity(
        f"the stream's reader stalled: it took nothing for {STALL_S:g} s, or for {LAG_S:g} s while more than "
        f"{MAX_BUFFERED_BYTES} bytes piled up; the request was ended"
    )
