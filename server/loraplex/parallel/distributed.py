"""A group of ranks in processes of their own, on one machine or several, over torch.distributed.

Gloo carries what lies on CPUs and NCCL what lies on GPUs.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from loraplex.errors import GroupLost
from loraplex.parallel.rendezvous import Meeting

#: RuntimeErrors of this rank alone, which tell nothing of the others
_OURS: Final = (torch.OutOfMemoryError, torch.AcceleratorError)


class DistributedGroup:
    """This process's place in its group (``TPGroup``); a process has one. Owner: the loop that runs the steps."""

    def __init__(self, meeting: Meeting, device: torch.device, store: Store | None = None) -> None:
        """Returns when all ranks are there. ``store``: where this process has it already.

        Raises GroupLost: some did not come in time.
        """
        self.rank = meeting.rank
        self.size = meeting.size
        self._timeout_s = meeting.timeout_s
        # one copy, which the list form of all_gather does twice; torch 2.13 has renamed it
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        timeout = timedelta(seconds=meeting.timeout_s)
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=meeting.store(store),
                rank=meeting.rank,
                world_size=meeting.size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
        except RuntimeError as error:  # torch's DistError is one
            raise GroupLost(
                f"rank {meeting.rank} of {meeting.size} did not find the others at {meeting.host}:{meeting.port} "
                f"within {meeting.timeout_s:g} s: {_first_line(error)}"
            ) from error

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place; every rank gets the same bits. Raises GroupLost."""
        try:
            dist.all_reduce(tensor)
        except _OURS:
            raise
        except RuntimeError as error:
            raise self._lost(error) from error
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Every rank's ``tensor`` side by side along ``dim``. Raises GroupLost."""
        dim %= tensor.dim()
        whole = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        try:
            self._gather(whole, tensor.contiguous())
        except _OURS:
            raise
        except RuntimeError as error:
            raise self._lost(error) from error
        return whole.view(self.size, *tensor.shape).movedim(0, dim).flatten(dim, dim + 1)

    def _lost(self, error: RuntimeError) -> GroupLost:
        return GroupLost(
            f"rank {self.rank} of {self.size} lost the others: one of them ended, or said nothing for "
            f"{self._timeout_s:g} s ({_first_line(error)})"
        )


def _first_line(error: RuntimeError) -> str:
    """What happened, without where in the library's source and what its authors wish."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line.rpartition("] ")[2].partition(". ")[0] if line.startswith("[") else line
