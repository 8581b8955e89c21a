"""Timing of several ways to do the same thing, on a machine that others use too.

A Stopwatch knows the device; nothing else here or in the ops' files does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

WARM_UP = 3
#: how many times the last cache's size the inputs of one rotation span, so that none is met there again
CACHES = 2
MAX_SETS = 256
#: more than the last caches of a processor
COLD_HOST_BYTES = 128 << 20
COPY_BYTES = 1 << 30
COPY_REPEATS = 9


@dataclass(frozen=True, slots=True)
class Way:
    """One way to do the op: a call for each set of inputs, so that a rotation over all of them meets cold factors."""

    name: str
    calls: tuple[Callable[[], object], ...]
    capturable: bool = False
    """Whether its launches can be recorded and replayed: fixed shapes and memory, no wait for the device."""

    def run(self) -> None:
        """One rotation."""
        for call in self.calls:
            call()


@dataclass(frozen=True, slots=True)
class Timing:
    """Median microseconds of one call."""

    way: str
    us: float
    """Called from Python, one after another: what launching costs is in it."""
    replay_us: float | None
    """Recorded once and replayed; None where the device or the way cannot."""


class Stopwatch(Protocol):
    """How time passes on one device."""

    cold_bytes: int
    """Bytes that a rotation of inputs has to span for all of them to come from memory; 0: it is not asked for."""

    def elapsed_s(self, work: Callable[[], object]) -> float:
        """Seconds until everything that ``work`` starts is done."""
        ...

    def capture(self, work: Callable[[], object]) -> Callable[[], object] | None:
        """What replays the launches of ``work``, which has run before; None on a device that has no such thing."""
        ...

    def copy_bytes_per_s(self) -> float | None:
        """Bytes read and written each second by a large copy; None where inputs are not made to come from memory."""
        ...


@dataclass
class HostStopwatch:
    """The clock on the wall, for a device that works while it is called. Inputs may lie in its caches, unless
    ``cold_bytes`` are asked for."""

    cold_bytes: int = 0

    def elapsed_s(self, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def capture(self, work: Callable[[], object]) -> Callable[[], object] | None:
        del work
        return None

    def copy_bytes_per_s(self) -> float | None:
        """Of a pass in place: a copy to elsewhere reads what it overwrites, too, and that is not counted."""
        if not self.cold_bytes:
            return None
        values = torch.zeros(COPY_BYTES // 4)
        times = [self.elapsed_s(lambda: values.add_(1.0)) for _ in range(COPY_REPEATS)]
        return 2 * COPY_BYTES / min(times)


class CudaStopwatch:
    """Events on the device's current stream, and graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.cold_bytes = CACHES * int(torch.cuda.get_device_properties(device).L2_cache_size)

    def elapsed_s(self, work: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def capture(self, work: Callable[[], object]) -> Callable[[], object] | None:
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def copy_bytes_per_s(self) -> float | None:
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=self._device).random_()
        target = torch.empty_like(source)
        target.copy_(source)
        times = [self.elapsed_s(lambda: target.copy_(source)) for _ in range(COPY_REPEATS)]
        return 2 * COPY_BYTES / statistics.median(times)


def stopwatch_for(device: torch.device, *, cold_host: bool = False) -> Stopwatch:
    """The stopwatch of a device. ``cold_host``: on a CPU inputs have to come from memory, too."""
    if device.type == "cuda":
        return CudaStopwatch(device)
    return HostStopwatch(COLD_HOST_BYTES if cold_host else 0)


def num_sets(stopwatch: Stopwatch, set_bytes: int) -> int:
    """How many sets of inputs, of ``set_bytes`` each, a rotation needs."""
    return max(1, min(MAX_SETS, -(-stopwatch.cold_bytes // max(1, set_bytes))))


def measure(ways: Sequence[Way], stopwatch: Stopwatch, *, repeats: int, calls: int) -> tuple[Timing, ...]:
    """Time every way; in each repeat each has its turn of at least ``calls`` calls, so that all meet the same noise."""
    turns: dict[tuple[str, bool], tuple[Callable[[], object], int]] = {}
    for way in ways:
        for _ in range(WARM_UP):
            way.run()
        turns[way.name, False] = way.run, len(way.calls)
        replay = stopwatch.capture(way.run) if way.capturable else None
        if replay is not None:
            replay()
            turns[way.name, True] = replay, len(way.calls)
    samples: dict[tuple[str, bool], list[float]] = {turn: [] for turn in turns}
    for _ in range(repeats):
        for turn, (run, calls_a_run) in turns.items():
            runs = -(-calls // calls_a_run)
            seconds = stopwatch.elapsed_s(lambda run=run, runs=runs: _times(run, runs))  # type: ignore[misc]
            samples[turn].append(seconds / (runs * calls_a_run) * 1e6)
    medians = {turn: statistics.median(times) for turn, times in samples.items()}
    return tuple(Timing(way.name, medians[way.name, False], medians.get((way.name, True))) for way in ways)


def _times(run: Callable[[], object], runs: int) -> None:
    for _ in range(runs):
        run()


class WrongResult(Exception):
    """A way's result is not the reference's: its time says nothing."""
