"""A device's queue of work, as the runner sees it: work is put in, done in order, and results are fetched later.

Why order is all the protection that memory needs. Whatever the engine reuses (a page, an adapter's slot, a tensor's
memory) is written by work that is put in after the work that still reads it. So the host may give a thing back while
steps that were launched with it have not run yet: its next user's work stands behind theirs. Three things must hold:

- pages are cleared, and slots written and cleared, by work on this same stream or by work that waits for it;
- device memory comes from torch's allocator, which gives a freed block to later work of the same stream only;
- host memory that is copied from or to is pinned and comes from torch's allocator too, which gives a block out again
  only when the copies recorded on it are over. A buffer of our own could be overwritten before it is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

#: between two looks at what else there is, while a result is waited for
_WATCH_S: Final = 0.1


class Fetch(Protocol):
    """A result on its way to the host."""

    def wait(self, watch: Callable[[], None] | None = None) -> list[int]:
        """The values, once the work that makes them is done; later work is not waited for.

        ``watch`` is called now and then meanwhile, where the wait could be without end: work of a device may stand for
        another rank that is no more. Raises what the work raised, and what ``watch`` does.
        """
        ...


class Stream(Protocol):
    """Work in order; ``put`` and ``fetch`` return while it may still be under way."""

    def send(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        """``values`` on the device, for work put in from now on."""
        ...

    def put(self, work: Callable[[], None]) -> None:
        """Put in work: it may launch kernels, and must not wait for one."""
        ...

    def fetch(self, work: Callable[[], torch.Tensor]) -> Fetch:
        """Put in work that ends in an int64 tensor ``[N]``, and begin to bring that to the host."""
        ...


class CudaStream:
    """The device's current stream: kernels are asynchronous by themselves, so work is put in by doing it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values).pin_memory().to(self._device, non_blocking=True)

    def put(self, work: Callable[[], None]) -> None:
        work()

    def fetch(self, work: Callable[[], torch.Tensor]) -> Fetch:
        result = work()
        host = torch.empty(result.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(result, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return _CudaFetch(host, event)


class _CudaFetch:
    def __init__(self, host: torch.Tensor, event: torch.cuda.Event) -> None:
        self._host = host
        self._event = event

    def wait(self, watch: Callable[[], None] | None = None) -> list[int]:
        if watch is not None:
            watched(self._event.query, watch)
        self._event.synchronize()  # lets other threads of this process run meanwhile
        values: list[int] = self._host.tolist()
        return values


def watched(done: Callable[[], bool], watch: Callable[[], None]) -> None:
    """Return when ``done``, and call ``watch`` now and then until it is. Raises what ``watch`` does."""
    look_s = time.monotonic() + _WATCH_S
    while not done():
        time.sleep(0)  # other threads of this process
        if time.monotonic() >= look_s:
            watch()
            look_s = time.monotonic() + _WATCH_S


def stream_of(device: torch.device) -> Stream | None:
    """The device's stream; None where work is done when it is asked for, and nothing could overlap."""
    return CudaStream(device) if device.type == "cuda" else None
