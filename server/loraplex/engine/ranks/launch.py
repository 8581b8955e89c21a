"""The first rank's group: processes on this machine and on others, their sockets, and the store where all ranks meet.

On one machine sockets lie in the engine's own directory and the store listens on loopback alone. On several all of them
listen at the address that the others reach this one at. Ports are of the system's choice, but for the endpoint's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import torch
import zmq

from loraplex.config import Config
from loraplex.engine.ranks.digest import group_digest
from loraplex.engine.ranks.leader import Leader, Line, Peer
from loraplex.engine.ranks.link import OtherNodes, Progress
from loraplex.engine.ranks.orders import RankStart
from loraplex.engine.ranks.processes import RanksHere
from loraplex.engine.ranks.sockets import Context, Socket, bound
from loraplex.parallel.group import TPGroup
from loraplex.parallel.joining import join_group
from loraplex.parallel.network import Endpoint
from loraplex.parallel.rendezvous import KeptStore, keep_store, use_store

#: how long a rank may say nothing where the others wait for it; no step takes so long
PATIENCE_S: Final = 30.0
_LOOPBACK: Final = "127.0.0.1"


def lead(config: Config, model_dir: Path, here: RanksHere, progress: Progress) -> Leader:
    """Tell every other rank what it is, and lead them. ``here``: those of this machine.

    Raises InvalidConfig: the endpoint cannot be had; GroupLost: the store that others keep there is not to be found.
    """
    size = config.model.tensor_parallel_size
    store = _store(config)
    context: Context = zmq.Context.instance()
    digest = group_digest(config, model_dir)

    def line(rank: int, names: Sequence[str], begin: Callable[[RankStart], Peer]) -> Line:
        orders, questions = (bound(context, name) for name in names)
        meeting = store.meeting(rank, size, PATIENCE_S)
        start = RankStart(config, str(model_dir), meeting, _name(orders), _name(questions), digest, here.place)
        return Line(rank, begin(start), orders, questions)

    lines = [
        line(rank, [f"{here.address}.{rank}{what}" for what in "oq"], process.begin)
        for rank, process in enumerate(here.processes, start=1)
    ]
    nodes = None
    if config.nodes.nnodes > 1:
        nodes = OtherNodes(config, store.endpoint.own_address(), progress)
        names = [f"tcp://{nodes.call.host}:*"] * 2
        lines += [line(rank, names, nodes.rank) for rank in range(config.ranks_here, size)]
        store.announce(msgspec.json.encode(nodes.call).decode())
    first = store.meeting(0, size, PATIENCE_S)

    def join(device: torch.device) -> TPGroup:
        return join_group(first, device, place=here.place, store=store.store, lost=lambda: _ended(lines))

    return Leader(lines, join, patience_s=PATIENCE_S, machines=nodes)


def _ended(lines: Sequence[Line]) -> str:
    return next((f"rank {line.rank} ended: {why}" for line in lines if (why := line.peer.ended())), "")


def _store(config: Config) -> KeptStore:
    size, nodes = config.model.tensor_parallel_size, config.nodes
    if nodes.nnodes == 1:
        return keep_store(_LOOPBACK, 0, size, PATIENCE_S)
    endpoint = Endpoint.parse(nodes.rdzv_endpoint)
    if nodes.external_store:
        return use_store(endpoint, size, nodes.rdzv_timeout_s)
    return keep_store(endpoint.address(), endpoint.port, size, PATIENCE_S)


def _name(socket: Socket) -> str:
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
