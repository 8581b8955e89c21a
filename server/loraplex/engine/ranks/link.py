"""One TCP connection between the first rank and each other machine: how a machine begins, and how both see an end.

It is to a machine what the pipe on standard input is to a process: it says what each rank is to be, and when it closes,
the far end is gone. Lines of JSON. The first rank knows no more of another machine than is said here.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import torch

from loraplex import __version__
from loraplex.config import Config
from loraplex.engine.messages import Failure
from loraplex.engine.ranks.orders import RankStart
from loraplex.errors import GroupLost, InvalidConfig
from loraplex.parallel.network import Endpoint, keep_alive, listen

log = logging.getLogger("loraplex.ranks")

#: between two looks at whether somebody came
_LOOK_S: Final = 0.1
#: how long an ordered end may take before the connection is closed
_STOP_S: Final = 5.0
#: what is said begins at once
_SPEAK_S: Final = 10.0
#: a start is some kilobytes; who sends more is somebody else
_LONGEST_LINE: Final = 1 << 20
#: what must be alike on all machines, by its name in the configuration; where the model lies may differ
_ALIKE: Final = ("model", "engine")
_MAY_DIFFER: Final = ("model.model", "model.revision")

Progress = Callable[[str, int, int], None]
Settings = dict[str, Any]


class Call(msgspec.Struct, frozen=True):
    """Where the first rank waits for the other machines, and what it knows them by."""

    host: str
    port: int
    token: str


class NodeHello(msgspec.Struct, frozen=True, tag=True):
    """A machine that came. ``settings``: its configuration, as plain values, for versions may differ."""

    token: str
    node_rank: int
    version: str
    settings: Settings


class RankEnded(msgspec.Struct, frozen=True, tag=True):
    """A rank of that machine is no more."""

    rank: int
    reason: str


class NodeRefused(msgspec.Struct, frozen=True, tag=True):
    """That machine cannot take part, and need not try again."""

    failure: Failure


class Over(msgspec.Struct, frozen=True, tag=True):
    """The server ends and is not started anew: in order, or because of ``failure``."""

    failure: Failure | None


FromNode = NodeHello | RankEnded
ToNode = RankStart | NodeRefused | Over


class Connection:
    """Messages over one socket, either way. Owner: whoever made it."""

    def __init__(self, connected: socket.socket, takes: Any) -> None:
        """``takes``: the type of what is received."""
        keep_alive(connected)
        connected.settimeout(_SPEAK_S)
        self._socket = connected
        self._decode = msgspec.json.Decoder(takes).decode
        self._begun = b""

    def send(self, message: msgspec.Struct) -> None:
        """Nothing where the far end is gone: ``receive`` says so."""
        with contextlib.suppress(OSError):
            self._socket.sendall(msgspec.json.encode(message) + b"\n")

    def receive(self, wait_s: float) -> list[Any] | None:
        """What has come, after ``wait_s`` at most; None: the far end is gone, or talks nonsense."""
        if not _readable(self._socket, wait_s):
            return []
        try:
            read = self._socket.recv(1 << 16)
        except OSError:
            return None
        *lines, self._begun = (self._begun + read).split(b"\n")
        if not read or len(self._begun) > _LONGEST_LINE:
            return None
        try:
            return [self._decode(line) for line in lines]
        except msgspec.MsgspecError as error:
            log.warning("a machine of the group sent what is no message: %s", error)
            return None

    def close(self) -> None:
        self._socket.close()


def answer(call: Call, config: Config) -> Connection:
    """The connection of the machine with ``config`` to the first rank. Raises OSError: it is gone."""
    connected = socket.create_connection((call.host, call.port), timeout=_SPEAK_S)
    connection = Connection(connected, ToNode)
    connection.send(NodeHello(call.token, config.nodes.node_rank, _version(), _settings(config)))
    return connection


@dataclass(slots=True)
class _Node:
    """Another machine. ``connection`` is there once it has come, and None again when it is gone."""

    starts: list[RankStart] = field(default_factory=list)
    connection: Connection | None = None
    gone: str = ""


class OtherNodes:
    """The other machines as the first rank has them."""

    def __init__(self, config: Config, here: str, progress: Progress) -> None:
        """``here``: the address that they reach this one at. ``progress``: how many have come."""
        self._config = config
        self._endpoint = Endpoint.parse(config.nodes.rdzv_endpoint)
        self._progress = progress
        self._listening = listen(here)
        self.call = Call(here, int(self._listening.getsockname()[1]), secrets.token_hex(16))
        self._nodes = {node: _Node() for node in range(1, config.nodes.nnodes)}
        self._ended: dict[int, str] = {}
        self._lock = threading.Lock()  # the engine loop looks who has ended, and so does the adapter loader

    def rank(self, start: RankStart) -> RemoteRank:
        """The rank that ``start`` describes, which begins when its machine has come."""
        rank = start.meeting.rank
        self._nodes[self._node_of(rank)].starts.append(start)
        return RemoteRank(self, rank)

    def gather(self) -> None:
        """Return when all have come and begun.

        Raises GroupLost: one did not come in time; InvalidConfig: one that came has other settings or another version.
        """
        within_s = self._config.nodes.rdzv_timeout_s
        deadline = time.monotonic() + within_s
        log.info(
            "waiting for %d more machines at %s, %g s at most: the same command there, with --node-rank 1 and up",
            len(self._nodes),
            self._endpoint,
            within_s,
        )
        while missing := [rank for rank, node in self._nodes.items() if node.connection is None]:
            self._progress("other machines", len(self._nodes) - len(missing), len(self._nodes))
            if time.monotonic() > deadline:
                raise GroupLost(
                    f"node {', '.join(map(str, missing))} of {self._config.nodes.nnodes} did not come to "
                    f"{self._endpoint} within {within_s:g} s; start the same command there with --node-rank "
                    f"{missing[0]}"
                )
            if _readable(self._listening, _LOOK_S):
                self._welcome(self._listening.accept()[0])
            self._look()
            if lost := next((node.gone for node in self._nodes.values() if node.gone), ""):
                raise GroupLost(lost)
        self._listening.close()

    def ended(self, rank: int) -> str:
        """Why a rank is no more; empty while it is, or has yet to come."""
        with self._lock:
            self._look()
            return self._ended.get(rank) or self._nodes[self._node_of(rank)].gone

    def close(self, over: Over | None) -> None:
        """Let go of all. ``over``: what they are told; None: they wait for a new start."""
        with self._lock:
            for node in self._nodes.values():
                if node.connection is not None:
                    if over is not None:
                        node.connection.send(over)
                    node.connection.close()
                    node.connection = None
                node.gone = node.gone or "it was let go"
            self._listening.close()

    def _node_of(self, rank: int) -> int:
        return rank // self._config.ranks_here

    def _welcome(self, connected: socket.socket) -> None:
        connection = Connection(connected, FromNode)
        deadline = time.monotonic() + _SPEAK_S
        received: list[FromNode] | None = []
        while received == [] and time.monotonic() < deadline:
            received = connection.receive(_LOOK_S)
        hello = received[0] if received else None
        if not isinstance(hello, NodeHello) or hello.token != self.call.token:
            log.warning("somebody who is no machine of this group connected, and was sent away")
            connection.close()
            return
        node = self._nodes.get(hello.node_rank)
        error = self._why_not(hello, node)
        if error is not None:
            connection.send(NodeRefused(Failure.of(error)))
            connection.close()
            if node is None or node.connection is not None:
                log.warning("sent a machine away: %s", error)
                return
            raise error
        assert node is not None
        node.connection = connection
        for start in node.starts:
            connection.send(start)
        log.info("node %d of %d has come", hello.node_rank, self._config.nodes.nnodes)

    def _why_not(self, hello: NodeHello, node: _Node | None) -> InvalidConfig | None:
        nnodes = self._config.nodes.nnodes
        if node is None or node.connection is not None:
            taken = "there already" if node is not None else f"not one of 1 to {nnodes - 1}"
            return InvalidConfig(f"node rank {hello.node_rank} of {nnodes} is {taken} (--node-rank)", field="node_rank")
        if hello.version != _version():
            return InvalidConfig(f"node {hello.node_rank} runs {hello.version}, the first machine {_version()}")
        for key, (theirs, ours) in _differences(hello.settings, _settings(self._config)).items():
            return InvalidConfig(
                f"{key} is {theirs!r} on node {hello.node_rank} and {ours!r} on the first machine; all machines take "
                "the same flags but --node-rank",
                field=key,
            )
        return None

    def _look(self) -> None:
        """Take in what the machines have said."""
        for node_rank, node in self._nodes.items():
            if node.connection is None:
                continue
            received = node.connection.receive(0.0)
            if received is None:
                node.connection.close()
                node.connection = None
                node.gone = f"the connection to node {node_rank} of {self._config.nodes.nnodes} is lost"
            for message in received or ():
                if isinstance(message, RankEnded):
                    self._ended.setdefault(message.rank, f"on node {node_rank}, {message.reason}")


@dataclass(frozen=True, slots=True)
class RemoteRank:
    """A rank on another machine (``leader.Peer``)."""

    nodes: OtherNodes
    rank: int

    def ended(self) -> str:
        return self.nodes.ended(self.rank)

    def kill(self) -> None:
        """It ends with the connection."""

    def close(self) -> None:
        deadline = time.monotonic() + _STOP_S
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(_LOOK_S)


def _readable(waited_for: socket.socket, wait_s: float) -> bool:
    poll = select.poll()  # unlike select, it takes any number of open files
    poll.register(waited_for, select.POLLIN)
    return bool(poll.poll(wait_s * 1000))


def _version() -> str:
    return f"loraplex {__version__} on torch {torch.__version__}"


def _settings(config: Config) -> Settings:
    sections: Settings = msgspec.to_builtins(config)
    return {
        f"{section}.{key}": value
        for section in _ALIKE
        for key, value in sections[section].items()
        if f"{section}.{key}" not in _MAY_DIFFER
    }


def _differences(theirs: Settings, ours: Settings) -> dict[str, tuple[object, object]]:
    keys = sorted(theirs.keys() | ours.keys())
    return {key: (theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)}
