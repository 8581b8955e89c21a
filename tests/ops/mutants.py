"""Where a kernel with something wrong in it is run: in a process of its own, because it may write anywhere."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import ParamSpec

import pytest

from tests.interpreter import without_idle_work

P = ParamSpec("P")

#: what a mutant is away from the truth that took its process with it
FATAL = float("inf")


def text_of(module: str) -> str:
    """The text of a module of kernels. Skips where it is compiled for the GPU of this machine."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    if not importlib.import_module(module).KERNELS.interpreted:
        pytest.skip("kernels are compiled for the GPU of this machine; these tests are of the interpreter")
    return Path(spec.origin).read_text()


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
    """A process of a server's that has imported what takes long; each begins as that server is."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton", "loraplex_kernels.backend", "pytest"])
    return ProcessPoolExecutor(1, mp_context=context, initializer=without_idle_work)
