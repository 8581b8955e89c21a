"""Where a kernel with something wrong in it is run: in a process of its own, because it may write anywhere."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import ParamSpec

P = ParamSpec("P")

#: what a mutant is away from the truth that took its process with it
FATAL = float("inf")


class Ward:
    """One process, replaced when a mutant ends it. Owner: a test module's fixture."""

    def __init__(self) -> None:
        self._pool = _pool()

    def judge(self, judge: Callable[P, float], *args: P.args, **kwargs: P.kwargs) -> float:
        """``judge(...)`` over there: how far a mutant is from the truth; FATAL when the process did not live to tell.

        Raises what it raises. ``judge`` is a function of a module, and so are its arguments' types.
        """
        try:
            return self._pool.submit(judge, *args, **kwargs).result()
        except BrokenProcessPool:
            self.close()
            self._pool = _pool()
            return FATAL

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
