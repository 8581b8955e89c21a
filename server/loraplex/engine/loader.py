"""Reads adapters beside the engine loop: one thread that turns a source into a packed adapter on the host.

The thread computes alone and is a little less urgent than the step, so that the step keeps its cores: with a compute
team of its own a load took 3 to 20 s on two busy cores (0.3 s alone), and as the least urgent thread a minute and more.
It touches nothing the engine owns: jobs go in, results come out, and ``wake`` tells the loop.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.adapters.packed import PackedAdapter

_NICENESS: Final = 5


@dataclass(frozen=True, slots=True)
class LoadJob:
    """One adapter to read. ``key`` is whatever the caller finds its place by."""

    key: int
    name: str
    source: str


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A finished job: exactly one of ``adapter`` and ``error`` is set. ``began_s``: when its reading began, in
    monotonic seconds."""

    job: LoadJob
    adapter: PackedAdapter | None
    error: Exception | None
    began_s: float


class AdapterLoader:
    """Owns the thread. ``load`` runs on it and may raise anything."""

    def __init__(self, load: Callable[[LoadJob], PackedAdapter], wake: Callable[[], None]) -> None:
        self._load = load
        self._wake = wake
        self._jobs: queue.SimpleQueue[LoadJob] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="adapter-loader", daemon=True).start()

    def submit(self, job: LoadJob) -> None:
        """Queue a job; its result comes later."""
        self._jobs.put(job)

    def take_results(self) -> list[LoadResult]:
        """Results since the last call."""
        results = []
        with contextlib.suppress(queue.Empty):
            while True:
                results.append(self._results.get_nowait())
        return results

    def _work(self) -> None:
        stand_aside()
        while True:
            job = self._jobs.get()
            began_s = time.monotonic()
            try:
                result = LoadResult(job, self._load(job), None, began_s)
            except Exception as error:  # whatever a file can cause belongs to its own load
                result = LoadResult(job, None, error, began_s)
            self._results.put(result)
            self._wake()


def stand_aside() -> None:
    """Let the calling thread compute alone, and a little less urgently than the step."""
    with contextlib.suppress(OSError, AttributeError):  # not on every system; only the priority is lost
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    torch.set_num_threads(1)  # of this thread; the step's keeps what it has
