"""How ways are timed: each in its turn, by medians, replayed where possible, over as many inputs as a cache asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from bench.ops.timing import MAX_SETS, WARM_UP, HostStopwatch, Stopwatch, Timing, Way, measure, num_sets


@dataclass
class FakeStopwatch:
    """A device on which work takes as long as it says, and half as long when it is replayed."""

    cold_bytes: int = 0
    now_s: float = 0.0
    factor: float = 1.0
    captured: int = 0
    turns: list[float] = field(default_factory=list)

    def spend(self, seconds: float) -> None:
        self.now_s += self.factor * seconds

    def elapsed_s(self, work: Callable[[], object]) -> float:
        start = self.now_s
        work()
        self.turns.append(self.now_s - start)
        return self.now_s - start

    def capture(self, work: Callable[[], object]) -> Callable[[], object] | None:
        self.captured += 1

        def replay() -> None:
            self.factor /= 2
            work()
            self.factor *= 2

        return replay

    def copy_bytes_per_s(self) -> float | None:
        return 1e12


def way(name: str, stopwatch: FakeStopwatch, us: list[float], *, sets: int = 1, capturable: bool = False) -> Way:
    """Each call takes the next of ``us``, over and over."""
    calls = [0]

    def call() -> None:
        stopwatch.spend(us[calls[0] % len(us)] * 1e-6)
        calls[0] += 1

    return Way(name, (call,) * sets, capturable)


def test_each_way_gets_the_median_of_its_own_turns() -> None:
    stopwatch = FakeStopwatch()
    # after three warm-up calls, turns of one call each: 1, 1000, 2
    slow_once = way("slow once", stopwatch, [9, 9, 9, 1, 1000, 2])
    steady = way("steady", stopwatch, [5])
    assert measure([slow_once, steady], stopwatch, repeats=3, calls=1) == (
        Timing("slow once", pytest.approx(2), None),
        Timing("steady", pytest.approx(5), None),
    )
    assert [round(turn * 1e6) for turn in stopwatch.turns] == [1, 5, 1000, 5, 2, 5]


def test_a_capturable_way_is_also_replayed() -> None:
    stopwatch = FakeStopwatch()
    ways = [way("yes", stopwatch, [8], capturable=True), way("no", stopwatch, [8])]
    assert measure(ways, stopwatch, repeats=2, calls=3) == (
        Timing("yes", pytest.approx(8), pytest.approx(4)),
        Timing("no", pytest.approx(8), None),
    )
    assert stopwatch.captured == 1


def test_a_turn_is_whole_rotations_of_at_least_the_calls_asked_for() -> None:
    stopwatch = FakeStopwatch()
    (timing,) = measure([way("four sets", stopwatch, [1], sets=4)], stopwatch, repeats=1, calls=10)
    assert timing.us == pytest.approx(1)
    assert stopwatch.turns == [pytest.approx(12e-6)]


def test_what_compiles_does_so_before_it_is_timed() -> None:
    stopwatch = FakeStopwatch()
    compiling = way("compiles", stopwatch, [*[1e6] * WARM_UP, *[1] * 9])
    assert measure([compiling], stopwatch, repeats=3, calls=3)[0].us == pytest.approx(1)


def test_inputs_are_rotated_over_more_than_the_cache() -> None:
    assert num_sets(FakeStopwatch(cold_bytes=100), 30) == 4
    assert num_sets(FakeStopwatch(cold_bytes=100), 200) == 1
    assert num_sets(FakeStopwatch(cold_bytes=1 << 30), 1) == MAX_SETS


def test_the_host_asks_for_no_rotation_and_has_no_replay() -> None:
    stopwatch: Stopwatch = HostStopwatch()
    assert num_sets(stopwatch, 1) == 1
    (timing,) = measure([Way("nothing", (lambda: None,), capturable=True)], stopwatch, repeats=2, calls=2)
    assert timing.replay_us is None
    assert 0 <= timing.us < 1e5
