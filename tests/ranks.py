"""Tensor-parallel engines in one process: each other rank is a thread with a model, tables and a cache of its own.

The code is the server's on both sides of the sockets; only the sums over ranks are made here, in rank order. They are
ops of torch's dispatcher, as those of ``torch.distributed`` are: so a tape (``tests/fakes_graphs.py``) captures them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

import torch
import zmq

from loraplex.config import Config
from loraplex.engine.graphs import GraphCapture
from loraplex.engine.local import LocalEngine
from loraplex.engine.ranks.leader import Leader, Line
from loraplex.engine.ranks.worker import WorkerParts, work
from loraplex.engine.runner import Runner
from loraplex.errors import GroupLost
from loraplex.models.loader import plan_model
from tests.engines import local_engine
from tests.streams import EagerStream

#: a rank that does not come to a sum within this time never will
_PATIENCE_S = 60.0


class Meeting:
    """Where the members of one group bring their tensors. ``calls`` counts what each rank took part in."""

    def __init__(self, size: int) -> None:
        self.size = size
        _meetings[id(self)] = self
        self.calls: list[Counter[str]] = [Counter() for _ in range(size)]
        self._barrier = threading.Barrier(size)
        self._brought: list[torch.Tensor | None] = [None] * size

    def member(self, rank: int) -> Member:
        return Member(self, rank)

    def exchange(self, rank: int, tensor: torch.Tensor, what: str) -> list[torch.Tensor]:
        """All ranks' tensors, in rank order. Raises GroupLost when one does not come."""
        self.calls[rank][what] += 1
        self._brought[rank] = tensor.clone()
        self._wait()
        found = [brought for brought in self._brought if brought is not None]
        assert len({(brought.shape, brought.dtype) for brought in found}) == 1, "ranks brought different things"
        self._wait()
        return found

    def give_up(self) -> None:
        self._barrier.abort()

    def _wait(self) -> None:
        try:
            self._barrier.wait(_PATIENCE_S)
        except threading.BrokenBarrierError as error:
            raise GroupLost("a rank did not come to the meeting") from error


@dataclass(frozen=True)
class Member:
    """One rank's place in a group of threads (``TPGroup``)."""

    meeting: Meeting
    rank: int

    @property
    def size(self) -> int:
        return self.meeting.size

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = torch.ops.loraplex_tests.all_reduce_(tensor, id(self.meeting), self.rank)
        return summed

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        whole: torch.Tensor = torch.ops.loraplex_tests.all_gather(tensor, dim, id(self.meeting), self.rank)
        return whole


#: an op takes numbers and tensors alone
_meetings: WeakValueDictionary[int, Meeting] = WeakValueDictionary()


def _all_reduce_(tensor: torch.Tensor, meeting: int, rank: int) -> torch.Tensor:
    parts = _meetings[meeting].exchange(rank, tensor, "all_reduce")
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return tensor.copy_(total)


def _all_gather(tensor: torch.Tensor, dim: int, meeting: int, rank: int) -> torch.Tensor:
    return torch.cat(_meetings[meeting].exchange(rank, tensor, "all_gather"), dim)


_OPS: Final = torch.library.Library("loraplex_tests", "DEF")
_OPS.define("all_reduce_(Tensor(a!) tensor, int meeting, int rank) -> Tensor(a!)")
_OPS.define("all_gather(Tensor tensor, int dim, int meeting, int rank) -> Tensor")
_OPS.impl("all_reduce_", _all_reduce_, "CompositeExplicitAutograd")
_OPS.impl("all_gather", _all_gather, "CompositeExplicitAutograd")


@dataclass
class RankThread:
    """Another rank. ``runner`` is there once it serves."""

    run: Callable[[], None]
    error: BaseException | None = None
    runner: Runner | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._work, name="test-rank", daemon=True)
        self.thread.start()

    def ended(self) -> str:
        return "" if self.thread.is_alive() else repr(self.error or "its thread ended")

    def close(self) -> None:
        self.thread.join(_PATIENCE_S)

    def kill(self) -> None:
        """A thread ends when the meeting is given up."""

    def _work(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self.error = error


@dataclass(frozen=True)
class RankedEngine:
    """An engine over several ranks. ``runners`` are those of all ranks, the first one's first."""

    engine: LocalEngine
    meeting: Meeting
    others: list[RankThread]

    @property
    def runners(self) -> list[Runner]:
        here = self.engine.core._steps.executor.runner
        return [here, *(other.runner for other in self.others if other.runner is not None)]


@contextmanager
def ranked_engine(
    base_dir: Path, size: int, *, mode: str = "none", captures: Sequence[GraphCapture] = (), **options: object
) -> Iterator[RankedEngine]:
    """``local_engine`` over ``size`` ranks. ``captures``: one for each of them, where decode steps are captured."""
    meeting, context = Meeting(size), zmq.Context()
    lines: list[Line] = []
    threads: list[RankThread] = []

    def begin(config: Config) -> Leader:
        for rank in range(1, size):
            ours, theirs = _sockets(context, f"orders-{rank}"), _sockets(context, f"questions-{rank}")
            capture = captures[rank] if captures else None
            parts = WorkerParts(
                config, plan_model(base_dir, config.model), partial(meeting.member, rank), ours[1], theirs[1], capture
            )
            threads.append(_rank(parts, mode))
            lines.append(Line(rank, threads[-1], ours[0], theirs[0]))
        return Leader(lines, lambda device: meeting.member(0), patience_s=_PATIENCE_S)

    started: list[Leader] = []

    def others(config: Config) -> Leader:
        started.append(begin(config))
        return started[0]

    try:
        yield RankedEngine(
            local_engine(
                base_dir,
                mode=mode,
                others=others,
                tensor_parallel_size=size,
                capture=captures[0] if captures else None,
                **options,  # type: ignore[arg-type]
            ),
            meeting,
            threads,
        )
        errors = [thread.error for thread in threads if thread.error is not None]
        assert not errors, errors
    except BaseException:
        meeting.give_up()
        raise
    finally:
        for leader in started:
            leader.close()
        for line in lines:
            line.questions.close(linger=0)
        context.term()


def _sockets(context: zmq.Context[zmq.Socket[bytes]], name: str) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    one, other = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    for socket in (one, other):
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
    one.bind(f"inproc://{name}")
    other.connect(f"inproc://{name}")
    return one, other


def _rank(parts: WorkerParts, mode: str) -> RankThread:
    def run() -> None:
        def prepare(runner: Runner) -> None:
            if mode != "none":
                runner.stream = EagerStream()
            thread.runner = runner

        try:
            work(replace(parts, prepare=prepare))
        finally:
            parts.orders.close(linger=1000)

    thread = RankThread(run)
    return thread
