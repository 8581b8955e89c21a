"""The engine process: one loop that owns the core and moves messages between it and the front ends' sockets.

Started by ``engine/client.py`` as ``python -m loraplex.engine.process``. The first line of standard input is the
EngineStart in JSON; the pipe then stays open as the lifeline: when it closes, the front end is gone and so is the
engine. Everything it logs goes to standard error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import zmq

from loraplex.engine.messages import (
    HEARTBEAT_S,
    RANK_LOST,
    EngineStart,
    Failure,
    Hello,
    Loading,
    Ready,
    Shutdown,
    StartFailed,
    ToFrontEnd,
    decode_to_engine,
    encode,
)
from loraplex.engine.ranks.processes import RanksHere, start_here
from loraplex.errors import GroupLost, LoraplexError
from loraplex.logs import set_up_logging

if TYPE_CHECKING:
    from loraplex.engine.core import EngineCore

log = logging.getLogger("loraplex.engine")

#: between two looks at whether a start still has somebody to start for
_LOOK_MS: Final = 200


class EngineLoop:
    """Owns the socket and the core. Nothing else in this process touches either."""

    def __init__(
        self, router: zmq.Socket[bytes], core: EngineCore, wake: socket.socket, frontends: frozenset[bytes]
    ) -> None:
        """``frontends``: those that have said Hello already."""
        self._router = router
        self._core = core
        self._wake = wake
        self._frontends = set(frontends)
        self._running = True
        self.bad_frames = 0

    def run(self) -> bool:
        """Say that it is ready, and go on until Shutdown, or until the front end's end of the lifeline closes. Whether
        it was told to end."""
        for identity in tuple(self._frontends):
            self._send(identity, Ready(self._core.model_info))
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        poller.register(sys.stdin.fileno(), zmq.POLLIN)
        while self._running:
            events = dict(poller.poll(0 if self._core.has_work else int(HEARTBEAT_S * 1000)))
            if sys.stdin.fileno() in events and not os.read(sys.stdin.fileno(), 4096):
                log.info("the front end is gone: ending")
                return False
            if self._wake.fileno() in events:
                self._wake.recv(4096)
            self._receive()
            self._core.turn()
            self._send_all()
        return True

    def close(self, *, for_good: bool) -> None:
        """End the other ranks, if there are any. ``for_good``: nobody starts them anew."""
        self._core.close(for_good=for_good)

    def _receive(self) -> None:
        while self._running:
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                identity, payload = frames
                message = decode_to_engine(payload)
            except (ValueError, msgspec.MsgspecError) as error:
                self.bad_frames += 1
                log.warning("dropped a bad frame (%d so far): %s", self.bad_frames, error)
                continue
            if isinstance(message, Shutdown):
                self._running = False
            elif isinstance(message, Hello):
                self._frontends.add(identity)
                self._send(identity, Ready(self._core.model_info))
            else:
                self._core.handle(identity, message)

    def _send_all(self) -> None:
        to_each, to_all = self._core.take_outputs()
        for identity in tuple(self._frontends):
            for message in to_all:
                self._send(identity, message)
            for message in to_each.get(identity, ()):
                self._send(identity, message)

    def _send(self, identity: bytes, message: ToFrontEnd) -> None:
        try:
            self._router.send_multipart((identity, encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.warning("front end %s takes no messages (%s): its requests end", identity.hex(), error)
            self._frontends.discard(identity)
            self._core.drop_frontend(identity)


def main() -> int:
    """Serve until told to stop. Returns the exit code: 0 on an ordered end, 1 when the start failed, ``RANK_LOST``."""
    # Ctrl-C reaches the whole foreground group: the front end drains and then closes the lifeline.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineStart)
    set_up_logging(start.config.server.log_format, start.config.server.log_level)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.SNDHWM, 0)
    router.setsockopt(zmq.LINGER, 500)
    router.bind(start.address)
    identity = _first_hello(router)
    if identity is None:
        return 1
    try:
        loop = _build_loop(start, router, identity)
    except LoraplexError as error:
        router.send_multipart((identity, encode(StartFailed(Failure.of(error)))))
        return 1
    told = False
    try:
        told = loop.run()
    except GroupLost as error:
        log.error("the engine ends: %s", error)
        return RANK_LOST
    finally:
        loop.close(for_good=told)
    context.destroy()
    return 0


def _first_hello(router: zmq.Socket[bytes]) -> bytes | None:
    """The identity of the front end that started us; None when it is gone before it said anything."""
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    if router not in dict(poller.poll()):
        return None
    identity, _hello = router.recv_multipart()
    return identity


def _build_loop(start: EngineStart, router: zmq.Socket[bytes], identity: bytes) -> EngineLoop:
    # torch is imported here, after the socket answers, so that an early end of the front end is seen; and after the
    # other ranks' processes have begun, which import it too
    here = start_here(start.config, start.address)
    over = threading.Event()
    threading.Thread(target=_end_with_the_front_end, args=(over,), name="lifeline", daemon=True).start()
    try:
        return _assemble(start, router, identity, here)
    except BaseException:
        here.kill()
        raise
    finally:
        over.set()


def _end_with_the_front_end(over: threading.Event) -> None:
    """A start may wait for minutes, for other machines or a slow disk: not for a front end that is gone."""
    poller = zmq.Poller()
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    while not over.is_set():
        if poller.poll(_LOOK_MS) and not over.is_set():  # nothing is said here: it is the end
            os._exit(1)


def _assemble(start: EngineStart, router: zmq.Socket[bytes], identity: bytes, here: RanksHere) -> EngineLoop:
    from loraplex.engine.build import Means, build_core
    from loraplex.engine.ranks.launch import lead

    model_dir = Path(start.model_dir)
    progress = _progress(router, identity)
    others = None
    if start.config.model.tensor_parallel_size > 1:
        others = lead(start.config, model_dir, here, progress)
    wake_read, wake_write = socket.socketpair()
    wake_write.setblocking(False)
    try:
        core = build_core(
            start.config,
            model_dir,
            start.model_id,
            progress=progress,
            wake=lambda: _poke(wake_write),
            means=Means(others=others, text_spool=Path(start.text_spool)),
        )
    except BaseException as error:
        if others is not None:
            others.abandon(error)
        raise
    return EngineLoop(router, core, wake_read, frozenset((identity,)))


def _progress(router: zmq.Socket[bytes], identity: bytes) -> Callable[[str, int, int], None]:
    def report(stage: str, done: int, total: int) -> None:
        with contextlib.suppress(zmq.ZMQError):  # a front end that is gone is seen by its end of the lifeline
            router.send_multipart((identity, encode(Loading(stage, done, total))))

    return report


def _poke(wake: socket.socket) -> None:
    try:
        wake.send(b"\0")
    except BlockingIOError:
        return  # the loop has wake-ups enough to read


if __name__ == "__main__":
    sys.exit(main())
