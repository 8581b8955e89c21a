"""A further machine of a group: holds its ranks' processes, in one start of the server after the other.

Knows nothing of what they compute. They are told what they are by the first rank, over this machine's connection to it
(``link.py``), and end with it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from loraplex.config import Config
from loraplex.engine.ranks.link import Call, Connection, NodeRefused, Over, RankEnded, answer
from loraplex.engine.ranks.orders import RankStart
from loraplex.engine.ranks.processes import RankProcess
from loraplex.errors import GroupLost, InvalidConfig
from loraplex.parallel.network import Endpoint, group_environment
from loraplex.parallel.rendezvous import answer_call

#: between two looks at whether there is a first machine, and whether a process still is
_LOOK_S: Final = 0.2

Tell = Callable[[str], None]
"""Takes a line for whoever started this machine's part."""


class Node:
    """This machine's part in a server whose first rank is on another one."""

    def __init__(self, config: Config, model_dir: Path, tell: Tell) -> None:
        """``model_dir``: where the model lies here."""
        self._config = config
        self._model_dir = str(model_dir)
        self._tell = tell
        self._endpoint = Endpoint.parse(config.nodes.rdzv_endpoint)
        self._environment = group_environment(config)  # now: later the way may be gone for a while
        self._first = config.nodes.node_rank * config.ranks_here

    def run(self) -> None:
        """Take part until the server ends in order.

        Raises GroupLost: nobody called in time; the LoraplexError that this machine is refused for, or that the server
        could not start for.
        """
        over = False
        while not over:
            with self._ranks() as ranks:
                connection = self._connect()
                self._tell("taking part")
                with contextlib.closing(connection):
                    over = self._take_part(connection, ranks)
            self._tell("the server has ended" if over else "the group has ended: waiting for the next one")

    @contextlib.contextmanager
    def _ranks(self) -> Iterator[dict[int, RankProcess]]:
        """This machine's ranks, which import what they need while it waits."""
        processes = [RankProcess(self._environment) for _ in range(self._config.ranks_here)]
        try:
            yield dict(enumerate(processes, start=self._first))
        finally:
            for process in processes:
                process.close()

    def _connect(self) -> Connection:
        """The connection to the first rank, once it calls for this machine."""
        within_s = self._config.nodes.rdzv_timeout_s
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, RuntimeError, InvalidConfig):  # not there or not known yet, or ending
                call = self._call()
                if call is not None:
                    return answer(msgspec.json.decode(call, type=Call), self._config)
            time.sleep(_LOOK_S)
        nodes = self._config.nodes
        raise GroupLost(
            f"node {nodes.node_rank} of {nodes.nnodes} was not called at {self._endpoint} within {within_s:g} s: no "
            "server starts there, or another machine has this --node-rank"
        )

    def _call(self) -> str | None:
        self._endpoint.probe()
        return answer_call(self._endpoint, self._config.nodes.node_rank)

    def _take_part(self, connection: Connection, ranks: dict[int, RankProcess]) -> bool:
        """Whether the server has ended; False when only this start of it has."""
        told_of: set[int] = set()
        while (received := connection.receive(_LOOK_S)) is not None:
            for message in received:
                match message:
                    case RankStart(meeting=meeting):
                        ranks[meeting.rank].begin(msgspec.structs.replace(message, model_dir=self._model_dir))
                    case NodeRefused(failure):
                        raise failure.to_error()
                    case Over(failure):
                        if failure is not None:
                            raise failure.to_error()
                        return True
            for rank, process in ranks.items():
                if rank not in told_of and (reason := process.ended()):
                    told_of.add(rank)
                    connection.send(RankEnded(rank, reason))
        return False
