"""Who works at a merge: the loader's thread, and one more while nothing else wants a core.

A task is done by one thread alone, in the same way whichever it is, so that a merge comes out the same, to the bit,
however busy the server is. Two are done at once where both have room.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

R = TypeVar("R")

#: tasks that are known before their turn: one for the other thread, and one for when that is done
_AHEAD: Final = 2


@dataclass(frozen=True, slots=True)
class Task(Generic[R]):
    """``num_bytes``: what it takes while it is done, unless it claims others."""

    run: Callable[[], R]
    num_bytes: int = 0


def _always() -> bool:
    return True


def _nothing() -> None:
    return None


class Team:
    """``is_busy``: whether the other thread's core is wanted elsewhere; asked before each task. By itself it always is.
    ``enter`` is called by the other thread, which begins with the first task that there is for it."""

    def __init__(self, is_busy: Callable[[], bool] = _always, enter: Callable[[], None] = _nothing) -> None:
        self.is_busy = is_busy
        self._doing = threading.local()  # ``claim``: of the task that a thread is at
        self._other = ThreadPoolExecutor(1, "adapter-merger", initializer=enter)

    def in_order(self, tasks: Iterable[Task[R]], room: int | None) -> Generator[R, None, None]:
        """What each task returns. The calling thread alone takes them from ``tasks``, and does whichever the other
        thread has not begun, the next one first. Two are done at once if they take no more than ``room`` bytes; None:
        never. What has not begun when the generator is closed is not done."""
        coming, within = iter(tasks), _Room(room or 0, self._doing)
        waiting: deque[tuple[Callable[[], R], Future[R] | None]] = deque()
        try:
            while True:
                ahead = 0 if room is None or self.is_busy() else _AHEAD
                while len(waiting) <= ahead and (task := next(coming, None)) is not None:
                    waiting.append(self._offered(within.holding(task), for_other=bool(waiting)))
                if not waiting:
                    return
                task, future = None, waiting[0][1]  # a task may hold much, and is let go when it is done
                if future is None or future.cancel():
                    yield waiting.popleft()[0]()
                elif future.done() or not _done_meanwhile(waiting):
                    waiting.popleft()
                    yield future.result()
        finally:
            for _, future in waiting:
                if future is not None:
                    future.cancel()

    def claim(self, num_bytes: int) -> None:
        """Called by a task: it takes so many bytes from now on, and nothing of what it took before. Waits until there
        is room for them."""
        claim: Callable[[int], None] | None = getattr(self._doing, "claim", None)
        if claim is not None:
            claim(num_bytes)

    def _offered(self, run: Callable[[], R], *, for_other: bool) -> tuple[Callable[[], R], Future[R] | None]:
        return run, self._other.submit(run) if for_other else None

    def close(self) -> None:
        """End the other thread after the task that it is at."""
        self._other.shutdown(cancel_futures=True)


class _Room:
    """Bytes that tasks share, and that one alone may always exceed."""

    def __init__(self, num_bytes: int, doing: threading.local) -> None:
        self._num_bytes, self._taken = num_bytes, 0
        self._changed = threading.Condition()
        self._doing = doing

    def holding(self, task: Task[R]) -> Callable[[], R]:
        """The task, which waits until there is room for it."""

        def run() -> R:
            held = 0

            def claim(num_bytes: int) -> None:
                nonlocal held
                held, given = num_bytes, held
                self._exchange(given, num_bytes)

            claim(task.num_bytes)
            self._doing.claim = claim
            try:
                return task.run()
            finally:
                self._doing.claim = None
                claim(0)

        return run

    def _exchange(self, given: int, wanted: int) -> None:
        """What is given back is there for others meanwhile, so that two that want more do not wait for each other."""
        with self._changed:
            self._taken -= given
            self._changed.notify_all()
            if wanted > given:
                self._changed.wait_for(lambda: not self._taken or self._taken + wanted <= self._num_bytes)
            self._taken += wanted


def _done_meanwhile(waiting: deque[tuple[Callable[[], R], Future[R] | None]]) -> bool:
    """Whether the other thread is at the first of these and there was one behind it to be done here."""
    for place, (task, future) in enumerate(waiting):
        if place and future is not None and future.cancel():
            done: Future[R] = Future()
            try:
                done.set_result(task())
            except Exception as error:  # for when its turn comes
                done.set_exception(error)
            waiting[place] = task, done
            return True
    return False
