"""Reads adapters beside the engine loop: one thread that turns a source into a packed adapter on the host.

The thread computes alone and is a little less urgent than the step, so that the step keeps its cores: with a compute
team of its own a load took 3 to 20 s on two busy cores (0.3 s alone), and as the least urgent thread a minute and more.
It touches nothing the engine owns: jobs go in, results come out, and ``wake`` tells the loop.

Exports are the same thread's, for it alone may ask other ranks for their part of the base. They take minutes, so they
are done in pieces, one export after the other, and loads go in between.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Final, TypeVar

import torch

from loraplex.adapters.packed import PackedAdapter
from loraplex.errors import RequestCancelled
from loraplex.types import Export, ExportProgress

_NICENESS: Final = 5
#: how long an end waits for what is being written to be taken away again
_CLOSE_S: Final = 3.0

Pieces = Generator[ExportProgress, None, None]
T = TypeVar("T")


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


@dataclass(frozen=True, slots=True)
class ExportJob:
    """An adapter to write. ``key`` is whatever the caller finds its place by."""

    key: int
    export: Export


@dataclass(frozen=True, slots=True)
class ExportPiece:
    """How far an export has come, or its end: then ``progress`` is None, and ``error`` what it failed with, if it
    did."""

    key: int
    progress: ExportProgress | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Cancel:
    key: int


@dataclass(frozen=True, slots=True)
class _Close:
    """End the thread."""


def _no_exports(export: Export) -> Pieces:
    raise RequestCancelled(f"adapter {export.name!r}: this engine exports nothing")
    yield


class AdapterLoader:
    """Owns the thread. ``load`` and ``export`` run on it and may raise anything."""

    def __init__(
        self,
        load: Callable[[LoadJob], PackedAdapter],
        wake: Callable[[], None],
        export: Callable[[Export], Pieces] = _no_exports,
    ) -> None:
        self._load = load
        self._export = export
        self._wake = wake
        self._jobs: queue.SimpleQueue[LoadJob | ExportJob | _Cancel | _Close] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()
        self._pieces: queue.SimpleQueue[ExportPiece] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="adapter-loader", daemon=True)
        self._thread.start()

    def submit(self, job: LoadJob) -> None:
        """Queue a job; its result comes later."""
        self._jobs.put(job)

    def begin(self, job: ExportJob) -> None:
        """Queue an export; its pieces come later, and its end is the last of them."""
        self._jobs.put(job)

    def cancel(self, key: int) -> None:
        """End an export before its next piece: what it has written is taken away. One that is over stays as it is."""
        self._jobs.put(_Cancel(key))

    def take_results(self) -> list[LoadResult]:
        """Results since the last call."""
        return _taken(self._results)

    def take_pieces(self) -> list[ExportPiece]:
        """Pieces of exports since the last call."""
        return _taken(self._pieces)

    def close(self) -> None:
        """End the thread after what it is at; exports that have not ended leave nothing."""
        self._jobs.put(_Close())
        self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        stand_aside()
        exports: deque[tuple[int, Pieces]] = deque()
        try:
            while True:
                match self._next_job(wait=not exports):
                    case LoadJob() as job:
                        self._do_load(job)
                    case ExportJob(key, export):
                        exports.append((key, self._export(export)))
                    case _Cancel(key):
                        self._do_cancel(exports, key)
                    case _Close():
                        return
                    case None:
                        self._do_piece(exports)
        finally:
            for _, pieces in exports:
                pieces.close()

    def _next_job(self, *, wait: bool) -> LoadJob | ExportJob | _Cancel | _Close | None:
        """None: there is none, and it was not waited for."""
        with contextlib.suppress(queue.Empty):
            return self._jobs.get(block=wait)
        return None

    def _do_load(self, job: LoadJob) -> None:
        began_s = time.monotonic()
        try:
            result = LoadResult(job, self._load(job), None, began_s)
        except Exception as error:  # whatever a file can cause belongs to its own load
            result = LoadResult(job, None, error, began_s)
        self._results.put(result)
        self._wake()

    def _do_piece(self, exports: deque[tuple[int, Pieces]]) -> None:
        """The next piece of the first export."""
        key, pieces = exports[0]
        try:
            piece = ExportPiece(key, next(pieces))
        except StopIteration:
            piece = ExportPiece(key)
        except Exception as error:  # whatever a disk can cause belongs to its own export
            piece = ExportPiece(key, None, error)
        if piece.progress is None:
            exports.popleft()
        self._pieces.put(piece)
        self._wake()

    def _do_cancel(self, exports: deque[tuple[int, Pieces]], key: int) -> None:
        for one in [one for one in exports if one[0] == key]:
            exports.remove(one)
            one[1].close()
            error = RequestCancelled("the export was cancelled; nothing of it was kept")
            self._pieces.put(ExportPiece(key, None, error))
            self._wake()


def _taken(results: queue.SimpleQueue[T]) -> list[T]:
    taken = []
    with contextlib.suppress(queue.Empty):
        while True:
            taken.append(results.get_nowait())
    return taken


def stand_aside() -> None:
    """Let the calling thread compute alone, and a little less urgently than the step."""
    with contextlib.suppress(OSError, AttributeError):  # not on every system; only the priority is lost
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    torch.set_num_threads(1)  # of this thread; the step's keeps what it has
