"""A front end's handle on the engine process: starts it, sends it messages, and hands its answers to whoever waits.

Runs in the front end's asyncio loop and is touched by that loop alone. Knows no protobuf and no torch.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Final

import msgspec
import zmq
import zmq.asyncio

from loraplex.config import Config
from loraplex.engine.messages import (
    RANK_LOST,
    Abort,
    AdapterChanged,
    EngineStart,
    Failure,
    GetAdapter,
    Hello,
    ListAdapters,
    LoadAdapter,
    Loading,
    Outputs,
    PinAdapter,
    Ready,
    Reply,
    Shutdown,
    StartFailed,
    StepReport,
    Submit,
    ToEngine,
    ToFrontEnd,
    TokenEvent,
    UnloadAdapter,
    decode_to_front_end,
    encode,
)
from loraplex.errors import InvalidConfig, Unavailable
from loraplex.parallel.network import group_environment
from loraplex.types import AdapterInfo, ModelInfo, OnConflict, Request, UnloadMode

log = logging.getLogger("loraplex.client")

#: an engine that says nothing for so long hangs: its heartbeat comes every second, a step takes far less than this
SILENCE_S: Final = 60.0
#: how long an ordered end may take before the process is killed
_STOP_S: Final = 5.0
#: of a socket of the engine's, or of one of its ranks
_LONGEST_NAME: Final = "engine.1023q"
#: when a call that finds no engine may be sent again: one that is started anew takes some seconds
_RETRY_AFTER_S: Final = 2.0


class _Stream:
    """The events of one generation that its reader has not taken yet. Slow readers get them merged."""

    __slots__ = ("_events", "_waiter", "over")

    def __init__(self) -> None:
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self.over = False

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self.over = self.over or event.terminal
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> TokenEvent:
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._waiter = None
        events, self._events = self._events, []
        return events[0] if len(events) == 1 else _merged(events)


def _merged(events: list[TokenEvent]) -> TokenEvent:
    first, last = events[0], events[-1]
    return TokenEvent(
        ticket=first.ticket,
        token_ids=tuple(t for e in events for t in e.token_ids),
        logprobs=tuple(p for e in events for p in e.logprobs),
        prompt_logprobs=tuple(p for e in events for p in e.prompt_logprobs),
        adapters=first.adapters,
        finish=last.finish,
        failure=last.failure,
        usage=next((e.usage for e in reversed(events) if e.usage is not None), None),
    )


class EngineClient:
    """The engine as an object. ``start_engine`` makes it; ``close`` ends the process."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        socket: zmq.asyncio.Socket,
        model: ModelInfo,
        directory: Path | None,
        text_spool: Path,
    ) -> None:
        """``directory``: what ends with the engine."""
        self.model = model
        self.alive = True
        self.text_spool = text_spool
        self._process = process
        self._socket = socket
        self._directory = directory
        self._counter = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self._operations: dict[int, asyncio.Future[Reply]] = {}
        self._watchers: set[asyncio.Queue[AdapterInfo | None]] = set()
        self._report_callbacks: list[Callable[[StepReport], None]] = []
        self._load_callbacks: list[Callable[[float], None]] = []
        self._adapter_callbacks: list[Callable[[AdapterInfo], None]] = []
        self._death_callbacks: list[Callable[[str], None]] = []
        self._last_heard = time.monotonic()
        self._closing = False
        self._tasks = [
            asyncio.create_task(self._receive(), name="engine-receive"),
            asyncio.create_task(self._watch_process(), name="engine-watch"),
            asyncio.create_task(self._watch_silence(), name="engine-silence"),
        ]

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """Events until the end; closing the iterator aborts. Raises the LoraplexError the engine answered with."""
        self._check_alive()
        ticket = next(self._counter)
        stream = self._streams[ticket] = _Stream()
        self._send(Submit(ticket, request))
        try:
            while True:
                event = await stream.take()
                if event.failure is not None:
                    raise event.failure.to_error()
                yield event
                if event.finish is not None:
                    return
        finally:
            self._streams.pop(ticket, None)
            if not stream.over:
                self._send(Abort((ticket,)))

    async def load_adapter(
        self, name: str, source: str, pinned: bool = False, on_conflict: OnConflict = OnConflict.FAIL
    ) -> AdapterInfo:
        """Returns when the adapter can be served. A caller that goes away does not undo the load."""
        reply = await self._operate(lambda op: LoadAdapter(op, name, source, pinned, on_conflict))
        for callback in self._load_callbacks:
            callback(reply.load_s)
        return reply.adapters[0]

    async def unload_adapter(self, name: str, mode: UnloadMode = UnloadMode.DRAIN) -> AdapterInfo:
        """Returns when the last request that used it is over."""
        return (await self._operate(lambda op: UnloadAdapter(op, name, mode))).adapters[0]

    async def pin_adapter(self, name: str, pinned: bool) -> AdapterInfo:
        """Pin or unpin. Raises NotFound, or OverCapacity: it does not fit beside what is pinned."""
        return (await self._operate(lambda op: PinAdapter(op, name, pinned))).adapters[0]

    async def list_adapters(self) -> list[AdapterInfo]:
        """All adapters, by name."""
        return list((await self._operate(ListAdapters)).adapters)

    async def get_adapter(self, name: str) -> AdapterInfo:
        """One adapter. Raises NotFound."""
        return (await self._operate(lambda op: GetAdapter(op, name))).adapters[0]

    async def watch_adapters(self) -> AsyncGenerator[AdapterInfo]:
        """Every adapter as it stands, then each change, until the engine ends (Unavailable)."""
        queue: asyncio.Queue[AdapterInfo | None] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            for adapter in await self.list_adapters():
                yield adapter
            while (change := await queue.get()) is not None:
                yield change
            raise Unavailable("the engine ended")
        finally:
            self._watchers.discard(queue)

    def on_report(self, callback: Callable[[StepReport], None]) -> None:
        """Call back with every step's report."""
        self._report_callbacks.append(callback)

    def on_load(self, callback: Callable[[float], None]) -> None:
        """Call back with the seconds each adapter load took."""
        self._load_callbacks.append(callback)

    def on_adapter(self, callback: Callable[[AdapterInfo], None]) -> None:
        """Call back with each change of an adapter, before whoever asked for it is answered."""
        self._adapter_callbacks.append(callback)

    def on_death(self, callback: Callable[[str], None]) -> None:
        """Call back once, with the reason, when the engine ends without being asked to."""
        self._death_callbacks.append(callback)

    async def close(self) -> None:
        """End the engine: politely, then by force. Running generations end Unavailable."""
        if self._closing:
            return
        self._closing = True
        self._send(Shutdown())
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_S)
        except TimeoutError:
            log.warning("the engine did not end within %.0f s: killing it", _STOP_S)
            self._process.kill()
            await self._process.wait()
        self._end("the server is shutting down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        _release(self._socket, self._directory)

    def _check_alive(self) -> None:
        if not self.alive:
            raise Unavailable("the engine is gone", retry_after_s=_RETRY_AFTER_S)

    def _send(self, message: ToEngine) -> None:
        if self.alive:
            # the engine always reads and the queue has no bound, so this future is done at once
            self._socket.send(encode(message))

    async def _operate(self, make: Callable[[int], ToEngine]) -> Reply:
        self._check_alive()
        op = next(self._counter)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._operations[op] = future
        self._send(make(op))
        try:
            reply = await future
        finally:
            self._operations.pop(op, None)
        if reply.failure is not None:
            raise reply.failure.to_error()
        return reply

    async def _receive(self) -> None:
        while True:
            message = decode_to_front_end(await self._socket.recv())
            self._last_heard = time.monotonic()
            self._dispatch(message)

    def _dispatch(self, message: ToFrontEnd) -> None:
        match message:
            case Outputs(events, report):
                for event in events:
                    stream = self._streams.get(event.ticket)
                    if stream is not None:
                        stream.put(event)
                if report is not None:
                    for callback in self._report_callbacks:
                        callback(report)
            case Reply(op):
                future = self._operations.get(op)
                if future is not None and not future.done():
                    future.set_result(message)
            case AdapterChanged(adapter):
                for adapter_callback in self._adapter_callbacks:
                    adapter_callback(adapter)
                for queue in self._watchers:
                    queue.put_nowait(adapter)
            case _:
                log.warning("unexpected message from the engine: %s", type(message).__name__)

    async def _watch_process(self) -> None:
        code = await self._process.wait()
        if not self._closing:
            why = " (a rank of its tensor-parallel group was lost)" if code == RANK_LOST else ""
            self._end(f"the engine process ended with exit code {code}{why}")

    async def _watch_silence(self) -> None:
        while self.alive:
            await asyncio.sleep(SILENCE_S / 4)
            silence = time.monotonic() - self._last_heard
            if silence > SILENCE_S and not self._closing:
                log.error("the engine has said nothing for %.0f s: killing it", silence)
                self._process.kill()

    def _end(self, reason: str) -> None:
        """The engine is no more: everything that waits for it fails Unavailable, once."""
        if not self.alive:
            return
        self.alive = False
        error = Unavailable(reason, retry_after_s=0.0 if self._closing else _RETRY_AFTER_S)
        failure = Failure.of(error)
        for ticket, stream in self._streams.items():
            if not stream.over:
                stream.put(TokenEvent(ticket, failure=failure))
        for future in self._operations.values():
            if not future.done():
                future.set_exception(error)
        for queue in self._watchers:
            queue.put_nowait(None)
        if not self._closing:
            for callback in self._death_callbacks:
                callback(reason)


async def start_engine(
    config: Config,
    model_dir: Path,
    model_id: str,
    on_progress: Callable[[Loading], None],
    home: Path | None = None,
) -> EngineClient:
    """Start the engine process and wait until it serves. ``home``: a directory of the server's own, which outlives the
    engine; None: all that the engine has on disk ends with it.

    Raises the LoraplexError it could not start for, or Unavailable if it died without a word.
    """
    directory = home or Path(tempfile.mkdtemp(prefix="loraplex-"))  # mode 0700
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    address = f"ipc://{directory}/engine"
    if len(os.fsencode(directory / _LONGEST_NAME)) > zmq.IPC_PATH_MAX_LEN:
        _release(socket, None if home else directory)
        raise InvalidConfig(
            f"the engine's sockets lie in {str(directory)!r}, whose path is too long: with a name in it, at most "
            f"{zmq.IPC_PATH_MAX_LEN} bytes are allowed; set TMPDIR to a shorter directory"
        )
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(address)
    start = EngineStart(config, str(model_dir), model_id, address, str(directory / "text"))
    process: asyncio.subprocess.Process | None = None
    try:
        process = await asyncio.create_subprocess_exec(  # asyncio ends the process where this is cancelled
            sys.executable,
            "-m",
            "loraplex.engine.process",
            stdin=asyncio.subprocess.PIPE,
            env=group_environment(config),
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        await process.stdin.drain()
        await socket.send(encode(Hello()))
        model = await _until_ready(process, socket, on_progress)
    except BaseException:
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
        _release(socket, None if home else directory)
        raise
    return EngineClient(process, socket, model, None if home else directory, Path(start.text_spool))


async def _until_ready(
    process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket, on_progress: Callable[[Loading], None]
) -> ModelInfo:
    death = asyncio.create_task(process.wait())
    try:
        while True:
            incoming = asyncio.ensure_future(socket.recv())
            await asyncio.wait({incoming, death}, return_when=asyncio.FIRST_COMPLETED)
            if not incoming.done():
                incoming.cancel()
                raise Unavailable(f"the engine process ended with exit code {death.result()} while starting")
            match decode_to_front_end(incoming.result()):
                case Ready(model):
                    return model
                case StartFailed(failure):
                    raise failure.to_error()
                case Loading() as loading:
                    on_progress(loading)
                case _:
                    continue
    finally:
        death.cancel()


def _release(socket: zmq.asyncio.Socket, directory: Path | None) -> None:
    socket.close()
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)
