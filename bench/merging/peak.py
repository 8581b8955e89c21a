"""How much memory a piece of work takes at its height, counted where it is allocated.

Torch's CPU allocator tells its profiler of every block, those inside of an operation too; NumPy's arrays, bytes and all
that is Python's are traced by ``tracemalloc``. What a library takes from the system by itself is not seen: the blocks
of its own that a matrix library packs into.
"""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes beyond those at the beginning. ``tensors``: torch's, at their height, with what is left of them in the
    end. ``others``: all others at theirs, without what is left of them. ``largest``: of torch's blocks."""

    tensors: int
    others: int
    largest: int

    @property
    def total(self) -> int:
        """At most: the two need not be at their height at once."""
        return self.tensors + self.others


@contextmanager
def heap_set_aside() -> Iterator[None]:
    """Objects that are there by now are not looked at for garbage meanwhile. ``peak_of`` does that each time, and it
    takes the longer the more there are: 0.3 s with all that transformers imports."""
    is_mine = not gc.get_freeze_count()  # all that is set aside comes back at once, whoever did it
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if is_mine:
            gc.unfreeze()


def peak_of(work: Callable[[], T]) -> tuple[T, Peak]:
    """What ``work`` returns, and its peak. Torch tells of the calling thread's blocks alone: work by it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler says on stderr that it begins, and ends
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        tracemalloc.start()
        try:
            result = work()
            left, highest = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()  # before the profiler gathers its events, which it would make many times slower
    live = height = largest = 0
    blocks = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for block in sorted(blocks, key=lambda event: event.start_ns()):
        live += block.nbytes()
        height, largest = max(height, live), max(largest, block.nbytes())
    return result, Peak(height, highest - left, largest)
