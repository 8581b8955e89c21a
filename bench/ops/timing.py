"""Timing of several ways to do the same thing on a machine that others use too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

WARM_UP = 3


def interleaved_us(ways: Mapping[str, Callable[[], object]], *, repeats: int, calls: int) -> dict[str, float]:
    """Median microseconds of one call of each way; in every repeat each way runs ``calls`` times, one after another."""
    for way in ways.values():
        for _ in range(WARM_UP):
            way()
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(calls):
                way()
            samples[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: statistics.median(times) for name, times in samples.items()}


class WrongResult(Exception):
    """A way's result is not the reference's: its time says nothing."""
