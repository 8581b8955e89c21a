"""The first rank's group over processes: sockets in the engine's own directory, a store on a port of the system's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import zmq

from loraplex.config import Config
from loraplex.engine.ranks.digest import group_digest
from loraplex.engine.ranks.leader import Leader, Line
from loraplex.engine.ranks.orders import RankStart
from loraplex.engine.ranks.processes import RankProcess
from loraplex.parallel.distributed import DistributedGroup, Meeting, keep_store

#: how long a rank may say nothing where the others wait for it; no step takes so long
PATIENCE_S: Final = 30.0
_HOST: Final = "127.0.0.1"


def lead(config: Config, model_dir: Path, address: str, processes: Sequence[RankProcess]) -> Leader:
    """Tell ``processes`` what they are, and lead them. ``address``: of the engine, beside which theirs are."""
    size = 1 + len(processes)
    store = keep_store(_HOST, size, PATIENCE_S)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    digest = group_digest(config, model_dir)
    lines = []
    for rank, process in enumerate(processes, start=1):
        names = [f"{address}.{rank}{what}" for what in "oq"]  # short: the path of a socket has some hundred bytes
        orders, questions = (_bound(context, name) for name in names)
        meeting = Meeting(_HOST, store.port, rank, size, PATIENCE_S)
        process.begin(RankStart(config, str(model_dir), meeting, names[0], names[1], digest))
        lines.append(Line(rank, process, orders, questions))
    here = Meeting(_HOST, store.port, 0, size, PATIENCE_S)
    return Leader(lines, lambda device: DistributedGroup(here, device, store), patience_s=PATIENCE_S)


def _bound(context: zmq.Context[zmq.Socket[bytes]], name: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.PAIR)
    # adapters' shares and a full queue of steps: neither may be dropped, and both are bounded by who sends them
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.bind(name)
    return socket
