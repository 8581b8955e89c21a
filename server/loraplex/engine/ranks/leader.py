"""The first rank's side of a group whose other ranks are elsewhere, at the far end of two sockets each.

Orders go down one socket, in the order in which all ranks do them; questions of the adapter loader's thread down the
other, so that they wait for no step and no step for them. Whether the far end is a process or a thread is not known
here (``launch.py``).
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import msgspec
import torch
import zmq

from loraplex.engine.messages import Failure
from loraplex.engine.pools import PoolSizes
from loraplex.engine.ranks.link import Over
from loraplex.engine.ranks.orders import (
    Answer,
    Beat,
    End,
    Failed,
    ForgetShare,
    Joining,
    Loaded,
    Order,
    Question,
    Refused,
    Reply,
    Serve,
    Serving,
    decode_answer,
    decode_reply,
    encode,
)
from loraplex.engine.ranks.others import Packer
from loraplex.engine.ranks.shares import SharingPacker, SlotMark, Speech
from loraplex.engine.ranks.sockets import Socket
from loraplex.errors import GroupLost, LoraplexError
from loraplex.models.base import BaseModel
from loraplex.parallel.group import TPGroup
from loraplex_kernels.lora.slots import SlotBook

log = logging.getLogger("loraplex.ranks")

#: a rank's process begins by importing what it needs, which a cold disk makes slow
_BEGIN_S: Final = 120.0
#: between two looks at whether a rank is still there, while something is waited for
_LOOK_S: Final = 0.1
#: seconds between beats of an idle group
_BEAT_S: Final = 1.0

#: how long a rank that ended may take to be seen as ended
_BLAME_S: Final = 0.5

A = TypeVar("A", Joining, Loaded, Serving)


class Peer(Protocol):
    """Another rank, from outside."""

    def ended(self) -> str:
        """Why it is no more; empty while it is."""
        ...

    def close(self) -> None:
        """Wait for an end that was ordered, or make it."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


class Machines(Protocol):
    """The other machines that ranks are on."""

    def gather(self) -> None:
        """Return when all have come. Raises GroupLost, and the LoraplexError that one of them is refused for."""
        ...

    def close(self, over: Over | None) -> None:
        """Let go of all. ``over``: what they are told; None: they wait for a new start."""
        ...


class ThisMachine:
    """No others."""

    def gather(self) -> None:
        return None

    def close(self, over: Over | None) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Line:
    """One other rank, and the two sockets to it."""

    rank: int
    peer: Peer
    orders: Socket
    questions: Socket


class Leader:
    """The other ranks as the engine has them (``others.Others``). Owned by the engine loop."""

    def __init__(
        self,
        lines: Sequence[Line],
        join: Callable[[torch.device], TPGroup],
        *,
        patience_s: float,
        machines: Machines | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``patience_s``: how long a rank may say nothing where it should. Loading is not such a time."""
        self.size = 1 + len(lines)
        self.weight_bytes = 0
        self._lines = lines
        self._join = join
        self._machines = machines or ThisMachine()
        self._patience_s = patience_s
        self._clock = clock
        self._forgotten: deque[int] = deque()
        self._asked_s = self._heard_s = clock()
        self._awaited: set[int] = set()  # ranks that have not answered the last beat
        self._closed = threading.Event()

    def join(self, device: torch.device) -> TPGroup:
        self._machines.gather()
        for line in self._lines:
            self._await(line, Joining, _BEGIN_S)
        return self._join(device)

    def agree(self, sizes: PoolSizes) -> PoolSizes:
        for line in self._lines:
            loaded = self._await(line, Loaded)
            sizes = sizes.least(loaded.sizes)
            self.weight_bytes += loaded.weight_bytes
        self.tell(Serve(sizes))
        return sizes

    def await_serving(self) -> None:
        for line in self._lines:
            self._await(line, Serving)

    def tell(self, order: Order) -> None:
        while self._forgotten:
            self._send(ForgetShare(self._forgotten.popleft()))
        self._send(order)

    def check(self) -> None:
        for line in self._lines:
            self._check_there(line)
            while line.orders.poll(0):
                self._take(line)
        now = self._clock()
        if self._awaited and now - self._asked_s > self._patience_s:
            silent = ", ".join(map(str, sorted(self._awaited)))
            raise GroupLost(f"rank {silent} of {self.size} has said nothing for {now - self._asked_s:.0f} s")
        if not self._awaited and now - self._asked_s >= _BEAT_S:
            self.tell(Beat())
            self._asked_s, self._awaited = now, {line.rank for line in self._lines}

    def blame(self, error: Exception) -> GroupLost:
        """The others notice as this rank does: whoever was first has ended by itself, and a moment later all have."""
        deadline = self._clock() + _BLAME_S
        while not (ended := {line.rank: why for line in self._lines if (why := line.peer.ended())}):
            if self._clock() > deadline:
                break
            time.sleep(_LOOK_S / 10)
        named = "".join(f"; rank {rank}: {why}" for rank, why in ended.items())
        told = str(error) if isinstance(error, GroupLost) else f"a step failed: {type(error).__name__}: {error}"
        return GroupLost(f"{told}{named}")

    def packer(self, model: BaseModel, slots: SlotBook, max_bytes: int) -> Packer:
        speech = Speech(self.size, ask=self._ask, tell=self.tell, forget=self._forgotten.append)
        return SharingPacker(model, max_bytes, SlotMark(slots), speech)

    def close(self, *, for_good: bool = True) -> None:
        self._closed.set()
        if not for_good:
            self._machines.close(None)  # their ranks end with it, whatever they hang in
        for line in self._lines:
            with contextlib.suppress(GroupLost):
                self._say(line, line.orders, encode(End()))
        for line in self._lines:
            line.peer.close()
            line.orders.close(linger=0)  # the other is the loader thread's, and goes with its context
        if for_good:
            self._machines.close(Over(None))

    def abandon(self, error: BaseException) -> None:
        """The start has failed: end all at once. What another try could mend, other machines wait for."""
        for line in self._lines:
            line.peer.kill()
            line.orders.close(linger=0)
        final = isinstance(error, LoraplexError) and not isinstance(error, GroupLost)
        self._machines.close(Over(Failure.of(error)) if final else None)

    def _send(self, order: Order) -> None:
        frame = encode(order)
        for line in self._lines:
            self._say(line, line.orders, frame)

    def _say(self, line: Line, socket: Socket, frame: bytes) -> None:
        """Queues are as long as they must be: a socket that does not take a frame has lost its far end."""
        try:
            socket.send(frame, zmq.NOBLOCK)
        except zmq.Again as error:
            reason = line.peer.ended() or "its connection is lost"
            raise GroupLost(f"rank {line.rank} of {self.size} ended: {reason}") from error

    def _await(self, line: Line, wanted: type[A], within_s: float = math.inf) -> A:
        """The next answer, which must be that. Loading takes as long as it takes: only an end is waited for no more."""
        began = self._clock()
        while not line.orders.poll(int(_LOOK_S * 1000)):
            self._check_there(line)
            if self._clock() - began > within_s:
                raise GroupLost(f"rank {line.rank} of {self.size} did not begin within {within_s:g} s")
        answer = self._take(line)
        assert isinstance(answer, wanted), f"rank {line.rank} answered {type(answer).__name__}"
        return answer

    def _take(self, line: Line) -> Answer:
        try:
            answer: Answer = decode_answer(line.orders.recv())
        except msgspec.MsgspecError as error:
            raise GroupLost(f"rank {line.rank} of {self.size} sent what is no answer: {error}") from error
        if isinstance(answer, Failed):
            raise answer.failure.to_error()
        if isinstance(answer, Beat):
            self._awaited.discard(line.rank)
        return answer

    def _check_there(self, line: Line) -> None:
        reason = line.peer.ended()
        if reason and not line.orders.poll(int(_BLAME_S * 1000)):  # its last word may come after the news of its end
            raise GroupLost(f"rank {line.rank} of {self.size} ended: {reason}")

    def _ask(self, questions: Iterable[tuple[int, Question]]) -> list[Reply]:
        asked: list[Line] = []
        try:
            for rank, question in questions:
                line = self._lines[rank - 1]
                self._say(line, line.questions, encode(question))
                asked.append(line)
        finally:  # every reply is taken, or the next question would get it
            replies = [self._reply(line) for line in asked]
        for reply in replies:
            if isinstance(reply, Refused):
                raise reply.failure.to_error()
        return replies

    def _reply(self, line: Line) -> Reply:
        while not line.questions.poll(int(_LOOK_S * 1000)):
            reason = line.peer.ended() or ("the server is ending" if self._closed.is_set() else "")
            if reason:
                raise GroupLost(f"rank {line.rank} of {self.size} ended: {reason}")
        reply: Reply = decode_reply(line.questions.recv())
        return reply
