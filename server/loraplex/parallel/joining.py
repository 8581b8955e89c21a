"""How a rank comes by its group: the one place that chooses what carries sums.

Ranks that compute on the CPUs of one machine share memory; all others speak over torch.distributed, gloo between CPUs
and NCCL between GPUs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._C._distributed_c10d import Store

from loraplex.parallel.distributed import DistributedGroup
from loraplex.parallel.group import TPGroup
from loraplex.parallel.rendezvous import Meeting
from loraplex.parallel.shared_memory import SharedMemoryGroup
from loraplex.parallel.shared_place import SharedPlace


def join_group(
    meeting: Meeting,
    device: torch.device,
    *,
    place: SharedPlace | None,
    store: Store | None = None,
    lost: Callable[[], str] = lambda: "",
) -> TPGroup:
    """This process's place in its group, when all ranks are there, or at once where they share memory.

    ``place``: that they share, where they are on one machine; ``store``: where this process has it already; ``lost``:
    who of the others has ended.

    Raises GroupLost: some did not come in time.
    """
    if place is not None and device.type == "cpu":
        return SharedMemoryGroup(place, meeting.rank, meeting.timeout_s, lost)
    return DistributedGroup(meeting, device, store)
