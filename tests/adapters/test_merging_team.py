"""A merge by two threads is that of one, to the bit; and what ends it leaves nothing running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import pytest
import torch

from loraplex.adapters.merging.merge import Merged, merge
from loraplex.adapters.merging.methods import METHODS
from loraplex.adapters.merging.team import Task, Team
from loraplex.errors import InvalidRequest
from loraplex.types import MergeOptions
from tests.adapters.peft_merges import adapter, view

R = TypeVar("R")


@contextmanager
def two(is_busy: Callable[[], bool] = lambda: False) -> Iterator[Team]:
    team = Team(is_busy, lambda: torch.set_num_threads(1))
    try:
        yield team
    finally:
        team.close()


@pytest.mark.parametrize(
    ("method", "max_error"),
    [(name, 0.0) for name in METHODS] + [(name, 0.5) for name in METHODS if "max_error" in METHODS[name].options],
)
def test_two_threads_merge_as_one_does(method: str, max_error: float) -> None:
    """Also where they are two now and then only."""
    base = view(*[(48, 32), (32, 48), (64, 64), (8, 32)] * 3)
    inputs = [(adapter(base, seed), 0.6 + seed) for seed in range(3)]
    taken = METHODS[method].options
    options = MergeOptions(method, density=0.4 if "density" in taken else 0.0, max_error=max_error)
    alone = merge(inputs, options, base)
    turns = iter([False, False, True, False, True, True, False] * 20)
    for is_busy in (lambda: False, lambda: next(turns)):
        with two(is_busy) as team:
            together = merge(inputs, options, base, team=team)
        assert_same(together, alone)


def test_two_threads_that_claim_more_at_once_merge_as_one_does() -> None:
    """Where nothing is pruned, and values fall so far that iteration begins again in float64."""
    base = view(*[(1536, 576)] * 4)
    inputs = [(adapter(base, seed), 1.0) for seed in range(2)]
    for delta, _ in inputs:
        for change in delta.sites.values():
            assert change.low_rank is not None
            change.low_rank.a.mul_(1e-2 ** torch.arange(change.low_rank.rank).unsqueeze(1))
    options = MergeOptions("dare_linear_svd", density=1.0)
    alone = merge(inputs, options, base)
    claims: list[threading.Thread] = []
    both = threading.Barrier(2, timeout=10)

    class Told(Team):
        def claim(self, num_bytes: int) -> None:
            first = threading.current_thread() not in claims
            claims.append(threading.current_thread())
            if first:
                both.wait()
            super().claim(num_bytes)

    team = Told(lambda: False, lambda: torch.set_num_threads(1))
    together = merge(inputs, options, base, team=team)
    team.close()
    assert len(claims) == len(base.sites)
    assert_same(together, alone)


def assert_same(ours: Merged, theirs: Merged) -> None:
    """To the bit, and in order."""
    assert list(ours.delta.sites) == list(theirs.delta.sites)
    assert list(ours.errors.items()) == list(theirs.errors.items())
    for name, change in theirs.delta.sites.items():
        mine, other = ours.delta.sites[name].low_rank, change.low_rank
        assert mine is not None
        assert other is not None
        assert torch.equal(mine.a, other.a)
        assert torch.equal(mine.b, other.b)


def test_what_a_task_raises_is_raised_at_its_turn() -> None:
    base = view((8, 8), (8, 8), (8, 8), (8, 8))
    one = adapter(base, 0)
    one.sites["s2"].low_rank.b.fill_(3e38)  # type: ignore[union-attr]
    seen = []
    with two() as team, pytest.raises(InvalidRequest, match=r"'s2' leaves the range of torch\.float32"):
        merge([(one, 1.0), (one, 1.0)], MergeOptions("ties_svd", density=0.5), base, seen.append, team)
    assert len(seen) == 2


def test_two_tasks_are_done_at_once_while_nothing_else_wants_a_core() -> None:
    """Each waits until the other has begun."""
    both = threading.Barrier(2, timeout=10)
    with two() as team:
        assert list(team.in_order([Task(both.wait)] * 2, 0)) in ([0, 1], [1, 0])


def test_two_tasks_that_have_no_room_together_are_done_one_after_the_other() -> None:
    """Also one that is too large by itself."""
    working = threading.Lock()
    seen: list[bool] = []

    def alone() -> None:
        seen.append(working.acquire(blocking=False))
        time.sleep(0.01)
        working.release()

    with two() as team:
        list(team.in_order([Task(alone, size) for size in (6, 5, 60, 6, 5, 60)], 10))
    assert seen == [True] * 6


class Watched(Team):
    """By itself, and knows what it was asked to do."""

    def in_order(self, tasks: Iterable[Task[R]], room: int | None) -> Generator[R, None, None]:
        self.tasks = list(tasks)
        self.room = room
        return super().in_order(self.tasks, room)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (MergeOptions("ties_svd", density=0.5), [True, True]),
        # more than a dense matrix in any case: the large one is not kept waiting, the small one has room
        (MergeOptions("ties_svd", density=0.5, max_error=0.5), [False, True]),
        (MergeOptions("svd", svd_clamp=0.99), [False, False]),
    ],
    ids=str,
)
def test_sites_are_merged_within_the_largest_dense_matrix(options: MergeOptions, sizes: list[bool]) -> None:
    base = view((512, 768), (64, 768))
    inputs = [(adapter(base, seed), 1.0) for seed in range(2)]
    team = Watched()
    merge(inputs, options, base, team=team)
    assert team.room is not None
    assert team.room == 512 * 768 * torch.float32.itemsize
    assert [0 < task.num_bytes <= team.room for task in team.tasks] == sizes
    assert [task.num_bytes == 0 for task in team.tasks] == [not size for size in sizes]


@pytest.mark.parametrize(
    "options", [MergeOptions("cat"), MergeOptions("svd"), MergeOptions("ties", density=0.5)], ids=str
)
def test_merges_of_factors_are_left_to_the_calling_thread(options: MergeOptions) -> None:
    """It is faster by itself."""
    base = view(*[(24, 16)] * 20)
    threads: set[threading.Thread] = set()

    class Told(Team):
        def in_order(self, tasks: Iterable[Task[R]], room: int | None) -> Generator[R, None, None]:
            def told(task: Task[R]) -> Callable[[], R]:
                def run() -> R:
                    threads.add(threading.current_thread())
                    return task.run()

                return run

            return super().in_order((replace(task, run=told(task)) for task in tasks), room)

    team = Told(lambda: False)
    merge([(adapter(base, seed), 1.0) for seed in range(2)], options, base, team=team)
    team.close()
    assert threads == {threading.current_thread()}


def test_a_task_that_has_room_beside_another_does_not_wait_for_it() -> None:
    both = threading.Barrier(2, timeout=10)
    with two() as team:
        assert set(team.in_order([Task(both.wait, 6), Task(both.wait, 4)], 10)) == {0, 1}


def test_a_task_that_claims_more_waits_until_there_is_room_for_it() -> None:
    """And what claims less does not; two that want more at once go on one after the other."""
    working, both = threading.Lock(), threading.Barrier(2, timeout=10)

    with two() as team:

        def alone() -> bool:
            both.wait()
            team.claim(7)
            mine = working.acquire(blocking=False)
            time.sleep(0.02)
            working.release()
            team.claim(4)
            return mine

        assert list(team.in_order([Task(alone, 5)] * 2, 10)) == [True, True]
        assert set(team.in_order([Task(both.wait, 5)] * 2, 10)) == {0, 1}


def test_what_is_claimed_beyond_all_room_keeps_others_out_until_its_task_ends() -> None:
    order: list[str] = []
    begun = threading.Event()

    with two() as team:

        def greedy() -> None:
            team.claim(60)
            begun.set()
            time.sleep(0.02)
            order.append("greedy")

        def modest() -> None:
            order.append("modest")

        def later() -> None:
            assert begun.wait(10)

        team.claim(5)  # outside of tasks it says nothing
        list(team.in_order([Task(later, 0), Task(greedy, 5), Task(modest, 5)], 10))
    assert order == ["greedy", "modest"]


def test_room_that_a_failed_task_had_is_there_again() -> None:
    def failing() -> None:
        raise RuntimeError("no")

    with two() as team:
        with pytest.raises(RuntimeError, match="no"):
            list(team.in_order([Task(failing, 10), Task(lambda: None, 10)], 10))
        results = team.in_order([Task(lambda: 1, 10), Task(failing, 10), Task(lambda: 2, 10)], 10)
        assert next(results) == 1
        with pytest.raises(RuntimeError, match="no"):
            next(results)
        assert list(team.in_order([Task(lambda: 3, 10)], 10)) == [3]


def test_a_busy_server_leaves_all_to_the_calling_thread() -> None:
    with two(lambda: True) as team:
        assert set(team.in_order([Task(threading.current_thread)] * 5, 0)) == {threading.current_thread()}


def test_tasks_that_are_not_waited_for_are_not_done() -> None:
    done: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def first() -> None:
        begun.wait(10)

    def second() -> None:
        begun.set()
        go_on.wait(10)
        done.append(1)

    with two() as team:
        tasks = [first, second, lambda: done.append(2), lambda: done.append(3)]
        results = team.in_order(map(Task, tasks), 0)
        next(results)
        results.close()
        go_on.set()
    assert done == [1]
