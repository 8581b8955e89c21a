"""Streams for a machine without a GPU: work done at once, and work done as late as a device ever could.

The late one catches a host that reads what is not there yet, or changes what a launched step still reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.runner import Runner
from loraplex.engine.stream import Fetch
from loraplex.layers.rows_table import RowsTable
from loraplex_kernels.lora import LoraTable


class EagerStream:
    """Work is done when it is put in; only its result is looked at later."""

    def send(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values.copy())

    def put(self, work: Callable[[], None]) -> None:
        work()

    def fetch(self, work: Callable[[], torch.Tensor]) -> Fetch:
        return _Arrived(work().clone())


class LazyStream:
    """Work is done when somebody waits for a result behind it, and not a moment before.

    ``fail_next``: an exception that the next piece of work raises, as a device error would come up: at the wait.
    """

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()
        self.fail_next: Exception | None = None
        self.error: Exception | None = None

    def send(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values.copy())

    def put(self, work: Callable[[], None]) -> None:
        self._work.append(work)

    def fetch(self, work: Callable[[], torch.Tensor]) -> Fetch:
        fetch = _Late(self, work)
        self._work.append(fetch.work)
        return fetch

    def run_until(self, done: Callable[[], bool]) -> None:
        """Do work in order until ``done``. Work that fails takes all that stands behind it along."""
        while self._work and not done():
            work = self._work.popleft()
            try:
                if self.fail_next is not None:
                    raise self.fail_next
                with torch.inference_mode():
                    work()
            except Exception as error:
                self.error, self.fail_next = error, None
                self._work.clear()

    def flush(self) -> None:
        """Do all there is."""
        self.run_until(lambda: False)

    def order_writes(self, table: LoraTable | RowsTable) -> None:
        """Let the table's writes stand behind the work put in before them, as on a device."""
        write, clear = table.write, table.clear

        def write_in_order(*args: object) -> None:
            self.flush()
            write(*args)  # type: ignore[arg-type]

        def clear_in_order(slot: int) -> None:
            self.flush()
            clear(slot)

        table.write = write_in_order  # type: ignore[method-assign]
        table.clear = clear_in_order  # type: ignore[method-assign]


class _Arrived:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def wait(self, watch: Callable[[], None] | None = None) -> list[int]:
        values: list[int] = self._tensor.tolist()
        return values


class _Late:
    def __init__(self, stream: LazyStream, work: Callable[[], torch.Tensor]) -> None:
        self._stream = stream
        self._make = work
        self._values: list[int] | None = None

    def work(self) -> None:
        self._values = self._make().tolist()

    def wait(self, watch: Callable[[], None] | None = None) -> list[int]:
        self._stream.run_until(lambda: self._values is not None)
        if self._values is None:
            assert self._stream.error is not None, "a result that nobody will make"
            raise self._stream.error
        return self._values


def overlap(runner: Runner, mode: str) -> None:
    """Make a CPU runner launch as one with a device does; mode ``none`` leaves it as it is."""
    if mode == "eager":
        runner.stream = EagerStream()
    elif mode == "lazy":
        stream = runner.stream = LazyStream()
        refs = runner.model.tables().values()
        for table in {id(table): table for ref in refs for table in (ref.table, ref.rows) if table}.values():
            stream.order_writes(table)


#: what tests of the engine run under
MODES = ("none", "eager", "lazy")
