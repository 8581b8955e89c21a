"""Ranks as processes that share memory: sums and gatherings, the same bits on all, and ranks that are lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch

from loraplex.errors import GroupLost
from loraplex.parallel.shared_memory import SharedMemoryGroup
from loraplex.parallel.shared_place import BUFFER_BYTES, make_place

#: of Python 3.12: a child runs nothing but what it is given here, and ends at once
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def tensors_of(rank: int) -> list[torch.Tensor]:
    """What a rank brings: exchanges of every size and type, many small ones in a row, and one in several pieces."""
    seeded = torch.Generator().manual_seed(rank)
    shapes = [(1,), (0, 8), (16, 576), *[(3, 5)] * 50, (BUFFER_BYTES // 4 + 3,)]
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return [torch.randn(shape, generator=seeded).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]


def in_processes(size: int, run: Callable[[SharedMemoryGroup], None]) -> None:
    """``run`` as every rank; this process is the first. Fails where another one does."""
    place = make_place(size)
    children = []
    for rank in range(1, size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                run(SharedMemoryGroup(place, rank, 20.0))
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    try:
        run(SharedMemoryGroup(place, 0, 20.0))
    finally:
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        for file in place.files:
            os.close(file)
    assert codes == [0] * (size - 1)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_get_the_sum_in_rank_order(size: int) -> None:
    everything = [tensors_of(rank) for rank in range(size)]

    def run(group: SharedMemoryGroup) -> None:
        for index, mine in enumerate(tensors_of(group.rank)):
            parts = [brought[index] for brought in everything]
            total = parts[0].to(torch.promote_types(mine.dtype, torch.float32))
            for part in parts[1:]:
                total = total + part
            assert group.all_reduce_(mine) is mine
            assert torch.equal(mine, total.to(mine.dtype)), index

    in_processes(size, run)


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_get_all_parts_side_by_side(size: int) -> None:
    def run(group: SharedMemoryGroup) -> None:
        for index, (dim, shape) in enumerate([(-1, (3, 5)), (0, (2, 7)), (1, (1, BUFFER_BYTES // 4 + 1))] * 3):
            parts = [torch.full(shape, float(rank + index)) for rank in range(size)]
            assert torch.equal(group.all_gather(parts[group.rank], dim), torch.cat(parts, dim))
            part = parts[group.rank].t()  # not contiguous
            assert torch.equal(group.all_gather(part, 0), torch.cat([one.t() for one in parts]))

    in_processes(size, run)


def test_a_fast_rank_waits_for_a_slow_one_before_it_writes_over_what_that_reads() -> None:
    def run(group: SharedMemoryGroup) -> None:
        for step in range(20):
            if group.rank == 1:
                time.sleep(0.005)
            mine = torch.full((1000,), float(step))
            assert torch.equal(group.all_reduce_(mine), torch.full((1000,), 2.0 * step))

    in_processes(2, run)


def test_a_rank_that_is_known_to_have_ended_is_waited_for_no_longer() -> None:
    place = make_place(2)
    group = SharedMemoryGroup(place, 0, 60.0, lost=lambda: "rank 1 ended: exit code -9")
    began = time.monotonic()
    with pytest.raises(GroupLost, match="rank 0 of 2 lost the others: rank 1 ended: exit code -9"):
        group.all_reduce_(torch.ones(3))
    assert time.monotonic() - began < 5.0


def test_a_silent_rank_is_named_when_time_is_up() -> None:
    group = SharedMemoryGroup(make_place(3), 0, 0.3)
    with pytest.raises(GroupLost, match=r"rank 0 of 3 waited 0\.3 s for rank 1, which said nothing"):
        group.all_reduce_(torch.ones(3))
