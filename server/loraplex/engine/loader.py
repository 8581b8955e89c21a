"""Reads adapters beside the engine loop: one thread that turns a source into a packed adapter on the host.

The thread computes alone and is a little less urgent than the step, so that the step keeps its cores: with a compute
team of its own a load took 3 to 20 s on two busy cores (0.3 s alone), and as the least urgent thread a minute and more.
It touches nothing the engine owns: jobs go in, results come out, and ``wake`` tells the loop.

Merges and exports are the same thread's, for it alone may ask other ranks for their part of the base. They take long,
so they are done in pieces, one after the other, merges first, and loads go in between. While sequences run, the thread
rests after each piece for three times as long as that took: a core that it shares with the step is the step's three
quarters of the time.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import torch

from loraplex.adapters.merging.recipe import is_recipe
from loraplex.adapters.merging.team import Team
from loraplex.adapters.packed import PackedAdapter
from loraplex.errors import RequestCancelled
from loraplex.types import Export, ExportProgress

_NICENESS: Final = 5
#: how long it rests after a piece of long work while sequences run, in times of what that took
_RESTS: Final = 3
#: how long an end waits for what is being written to be taken away again
_CLOSE_S: Final = 3.0

Pieces = Generator[ExportProgress, None, None]
GiveWay = Callable[[], None]
T = TypeVar("T")


def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class FoldOrder:
    """Fold the adapter into the base (``adapters/folding.py``), if it is still the one of this ``uid``, within
    ``room_bytes``."""

    uid: str
    room_bytes: int


@dataclass(frozen=True, slots=True)
class LoadJob:
    """One adapter to read. ``key`` is whatever the caller finds its place by. ``give_way`` is called between the pieces
    of long work: what waits behind it and is none is done then."""

    key: int
    name: str
    source: str
    fold: FoldOrder | None = None
    give_way: GiveWay = _nothing

    @property
    def is_long(self) -> bool:
        return self.fold is not None or is_recipe(self.source)


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


def _no_exports(export: Export, give_way: GiveWay) -> Pieces:
    raise RequestCancelled(f"adapter {export.name!r}: this engine exports nothing")
    yield


class AdapterLoader:
    """Owns the thread. ``load`` and ``export`` run on it and may raise anything; the latter gives way as it reads.
    ``team`` helps it with merges, and says whether there are steps that long work should rest for."""

    def __init__(
        self,
        load: Callable[[LoadJob], PackedAdapter],
        wake: Callable[[], None],
        team: Team,
        export: Callable[[Export, GiveWay], Pieces] = _no_exports,
    ) -> None:
        self._load = load
        self._export = export
        self._wake = wake
        self._team = team
        self._jobs: queue.SimpleQueue[LoadJob | ExportJob | _Cancel | _Close] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[LoadResult] = queue.SimpleQueue()
        self._pieces: queue.SimpleQueue[ExportPiece] = queue.SimpleQueue()
        # the thread's own: what is long and waits, or is in the middle of it
        self._merges: deque[LoadJob] = deque()
        self._exports: deque[tuple[int, Pieces]] = deque()
        self._in_piece: int | None = None  # the export that is in the middle of a piece, and cannot be closed
        self._cancelled: set[int] = set()
        self._piece_began_s = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="adapter-loader", daemon=True)
        self._thread.start()

    def submit(self, job: LoadJob) -> None:
        """Queue a job; its result comes later."""
        self._jobs.put(job)

    def begin(self, job: ExportJob) -> None:
        """Queue an export; its pieces come later, and its end is the last of them."""
        self._jobs.put(job)

    def cancel(self, key: int) -> None:
        """End an export, before its next piece if it is in one: what it has written is taken away. One that is over
        stays as it is."""
        self._jobs.put(_Cancel(key))

    def take_results(self) -> list[LoadResult]:
        """Results since the last call."""
        return _taken(self._results)

    def take_pieces(self) -> list[ExportPiece]:
        """Pieces of exports since the last call."""
        return _taken(self._pieces)

    def close(self) -> None:
        """End the thread after the piece that it is at: merges are given up, and exports leave nothing."""
        self._jobs.put(_Close())
        self._thread.join(_CLOSE_S)
        self._team.close()

    def _work(self) -> None:
        stand_aside()
        while not self._closed:
            if self._merges or self._exports:
                self._give_way()
            else:
                self._take_jobs(wait_s=None)
                self._piece_began_s = time.monotonic()
            if self._merges and not self._closed:
                self._do(replace(self._merges.popleft(), give_way=self._go_on))
            elif self._exports and not self._closed:
                self._do_piece()
        for key, _ in list(self._exports):
            self._end(key)

    def _go_on(self) -> None:
        """``_give_way``, in the middle of long work. Raises RequestCancelled: it is to go no further."""
        self._give_way()
        if self._closed:
            raise RequestCancelled("the engine ends")

    def _give_way(self) -> None:
        """Between two pieces of long work: do the loads that there are, and rest, if that is due."""
        rest_s = _RESTS * (time.monotonic() - self._piece_began_s) if self._team.is_busy() else 0.0
        self._take_jobs(wait_s=rest_s)
        self._piece_began_s = time.monotonic()

    def _take_jobs(self, *, wait_s: float | None) -> None:
        """Do the loads that there are, and those that come within ``wait_s``; None: wait until there is any job. What
        is long among the jobs waits on."""
        until_s = time.monotonic() + (wait_s or 0.0)
        left_s = wait_s
        with contextlib.suppress(queue.Empty):
            while not self._closed:
                match self._jobs.get(timeout=left_s):
                    case LoadJob() as job if job.is_long:
                        self._merges.append(job)
                    case LoadJob() as job:
                        self._do(job)
                    case ExportJob(key, export):
                        self._exports.append((key, self._export(export, self._go_on)))
                    case _Cancel(key) if key == self._in_piece:
                        self._cancelled.add(key)
                    case _Cancel(key):
                        self._end(key)
                    case _Close():
                        self._closed = True
                left_s = max(until_s - time.monotonic(), 0.0)

    def _do(self, job: LoadJob) -> None:
        began_s = time.monotonic()
        try:
            result = LoadResult(job, self._load(job), None, began_s)
        except Exception as error:  # whatever a file can cause belongs to its own load
            result = LoadResult(job, None, error, began_s)
        self._results.put(result)
        self._wake()

    def _do_piece(self) -> None:
        """The next piece of the first export."""
        key, pieces = self._exports[0]
        self._in_piece = key
        try:
            piece = ExportPiece(key, next(pieces))
        except StopIteration:
            piece = ExportPiece(key)
        except Exception as error:  # whatever a disk can cause belongs to its own export
            piece = ExportPiece(key, None, error)
        self._in_piece = None
        if piece.progress is None:
            self._exports.popleft()
        self._pieces.put(piece)
        self._wake()
        if key in self._cancelled:
            self._cancelled.discard(key)
            self._end(key)

    def _end(self, key: int) -> None:
        """An export that was cancelled, if it is not over."""
        for one in [one for one in self._exports if one[0] == key]:
            self._exports.remove(one)
            error: Exception = RequestCancelled("the export was cancelled; nothing of it was kept")
            try:
                one[1].close()
            except Exception as failure:  # as what a piece raises
                error = failure
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
