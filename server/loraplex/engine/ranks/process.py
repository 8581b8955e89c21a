"""The process of a rank that is not the first: ``python -m loraplex.engine.ranks.process``, by ``processes.py``.

The first line of standard input is the RankStart in JSON; the pipe then stays open as the lifeline: when it closes, the
first rank is gone and so is this one, in the middle of whatever it does.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import msgspec
import torch
import zmq

from loraplex.engine.defaults import check_devices, with_step_size
from loraplex.engine.messages import Failure
from loraplex.engine.ranks.digest import group_digest
from loraplex.engine.ranks.orders import Failed, RankStart, encode
from loraplex.engine.ranks.sockets import Context, Socket, connected
from loraplex.engine.ranks.worker import WorkerParts, work
from loraplex.errors import GroupLost, InvalidConfig, LoraplexError
from loraplex.logs import set_up_logging
from loraplex.models.loader import plan_model
from loraplex.models.placement import resolve_device
from loraplex.parallel.joining import join_group

log = logging.getLogger("loraplex.ranks")


def main() -> int:
    """Follow the first rank until it ends. Returns the exit code: 0 on an ordered end, 1 when anything failed."""
    # Ctrl-C reaches the whole foreground group: the front end drains, and then lifelines close.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    start = msgspec.json.decode(line, type=RankStart)
    server = start.config.server
    # the first rank says what all of them do
    set_up_logging(server.log_format, "warning" if server.log_level == "info" else server.log_level)
    threading.Thread(target=_end_with_the_first, name="lifeline", daemon=True).start()
    context: Context = zmq.Context()
    orders, questions = (connected(context, address) for address in (start.orders, start.questions))
    try:
        work(_parts(start, orders, questions))
    except GroupLost as error:
        log.error("rank %d ends: %s", start.meeting.rank, error)
        return 1
    except LoraplexError as error:
        orders.send(encode(Failed(Failure.of(error))))
        orders.close(linger=1000)
        return 1
    return 0


def _parts(start: RankStart, orders: Socket, questions: Socket) -> WorkerParts:
    model_dir, rank = Path(start.model_dir), start.meeting.rank
    digest = group_digest(start.config, model_dir)
    if digest != start.digest:
        raise InvalidConfig(
            f"rank {rank} of {start.meeting.size} has other code, or another model in {start.model_dir!r}, than the "
            f"first rank (digest {digest}, the first one's is {start.digest})"
        )
    first = resolve_device(start.config.model.device)
    check_devices(start.config, first)
    if first.type == "cuda":  # before the plan: it places the model on the device that is current
        torch.cuda.set_device(rank % start.config.ranks_here)
    plan = plan_model(model_dir, start.config.model)
    device = plan.placement.device
    config = msgspec.structs.replace(start.config, engine=with_step_size(start.config.engine, device))
    return WorkerParts(config, plan, partial(join_group, start.meeting, device, place=start.place), orders, questions)


def _end_with_the_first() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        continue
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
