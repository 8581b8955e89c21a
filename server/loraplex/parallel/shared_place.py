"""The memory that ranks of one machine share, before anything computes in it (``shared_memory.py``). No torch."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Final

#: of one buffer; larger tensors go in pieces
BUFFER_BYTES: Final = 1 << 22
#: ranks that share memory: each pair has two open files in every process, of some thousand that one may have
MOST_RANKS: Final = 16


@dataclass(frozen=True, slots=True)
class SharedPlace:
    """Open files of this process and of those that inherited them: the memory, and ``counts[writer][reader]``."""

    memory: int
    counts: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return len(self.counts)

    @property
    def files(self) -> tuple[int, ...]:
        """All of them."""
        return (self.memory, *itertools.chain.from_iterable(self.counts))


def make_place(size: int) -> SharedPlace:
    """For ``size`` ranks. Memory is taken as it is used."""
    memory = os.memfd_create("loraplex-sums", os.MFD_CLOEXEC)
    os.ftruncate(memory, 2 * size * BUFFER_BYTES)
    counts = tuple(tuple(_new_count() for _ in range(size)) for _ in range(size))
    return SharedPlace(memory, counts)


def _new_count() -> int:
    return os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
