"""A group of CPU ranks on one machine: sums and gatherings through memory that all of them map.

Each rank has two buffers there, which it writes in turns, and a count for every other rank, which it raises when a
buffer is written. Whoever has seen the counts of all others for one exchange knows that they are done reading the
exchange before, so two buffers and one wait suffice. Memory and counts are nameless files that processes inherit:
nothing is left behind, however they end. A system call on each side of every exchange orders what is written and read,
on any processor.

A sum of 16 rows of 576 float32 on two cores takes 22 us between two ranks and 127 between four; by gloo over loopback
it takes 240, and 8,000 to 10,000 (docs/PERFORMANCE.md).
"""

from __future__ import annotations

import itertools
import mmap
import os
import select
import time
from collections.abc import Callable, Iterator
from typing import Final

import torch

from loraplex.errors import GroupLost
from loraplex.parallel.shared_place import BUFFER_BYTES, SharedPlace

#: how often a count is looked at before a rank sleeps for it: some 50 us, as waking costs as much
_LOOKS: Final = 40
#: between two looks at whether the others still are
_WATCH_S: Final = 0.1


class SharedMemoryGroup:
    """This process's place in its group (``TPGroup``). Owner: the loop that runs the steps."""

    def __init__(self, place: SharedPlace, rank: int, timeout_s: float, lost: Callable[[], str] = lambda: "") -> None:
        """``timeout_s``: how long the others are waited for; ``lost`` says who has ended, sooner than that."""
        self.rank = rank
        self.size = place.size
        self._timeout_s = timeout_s
        self._lost = lost
        others = [other for other in range(self.size) if other != rank]
        self._ours = [place.counts[rank][other] for other in others]
        self._theirs = [(other, place.counts[other][rank]) for other in others]
        mapped = mmap.mmap(place.memory, 2 * self.size * BUFFER_BYTES)
        whole = torch.frombuffer(mapped, dtype=torch.uint8).view(2, self.size, BUFFER_BYTES)
        self._turns = itertools.cycle(tuple(tuple(turn) for turn in whole))

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in rank order and in float32 where ``tensor`` is narrower, in place; every rank gets the
        same bits. Raises GroupLost."""
        wide = torch.promote_types(tensor.dtype, torch.float32)
        flat = tensor.view(-1)
        for piece in _pieces(flat):
            first, *more = self._exchange(piece)
            if wide is tensor.dtype and more:
                torch.add(first, more[0], out=piece)
                for part in more[1:]:
                    piece += part
            else:
                total = first.to(wide)
                for part in more:
                    total += part
                piece.copy_(total)
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Every rank's ``tensor`` side by side along ``dim``. Raises GroupLost."""
        parts = tensor.new_empty(self.size, tensor.numel())
        done = 0
        for piece in _pieces(tensor.reshape(-1)):
            torch.stack(self._exchange(piece), out=parts[:, done : done + len(piece)])
            done += len(piece)
        return torch.cat([part.view(tensor.shape) for part in parts], dim)

    def _exchange(self, piece: torch.Tensor) -> list[torch.Tensor]:
        """What every rank brought, in rank order; to be read before the next exchange."""
        buffers = next(self._turns)
        seen = [buffer[: piece.nbytes].view(piece.dtype) for buffer in buffers]
        seen[self.rank].copy_(piece)
        for count in self._ours:
            os.eventfd_write(count, 1)
        for other, count in self._theirs:
            self._await(other, count)
        return seen

    def _await(self, other: int, count: int) -> None:
        for _ in range(_LOOKS):
            try:
                os.eventfd_read(count)
            except BlockingIOError:
                continue
            return
        deadline = time.monotonic() + self._timeout_s
        poll = select.poll()
        poll.register(count, select.POLLIN)
        while not poll.poll(_WATCH_S * 1000):
            if lost := self._lost():
                raise GroupLost(f"rank {self.rank} of {self.size} lost the others: {lost}")
            if time.monotonic() > deadline:
                raise GroupLost(
                    f"rank {self.rank} of {self.size} waited {self._timeout_s:g} s for rank {other}, which said nothing"
                )
        os.eventfd_read(count)


def _pieces(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    """As much as a buffer holds at a time; one of nothing, too, for all ranks meet for each tensor."""
    step = BUFFER_BYTES // flat.itemsize
    return (flat[start : start + step] for start in range(0, max(len(flat), 1), step))
