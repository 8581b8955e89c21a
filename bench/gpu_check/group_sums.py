"""The time of one sum, and of one gathering, over ranks at the sizes of decode steps.

``python -m bench.gpu_check.group_sums`` is one rank, and ``time_sums`` starts one for each. The Job is read from
standard input; the first rank answers with a line of JSON for each size.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, NoReturn

import msgspec
import torch

from bench.gpu_check.captures import capture_for
from bench.gpu_check.section import OutOfTime, Row, Setting
from bench.ops.timing import stopwatch_for
from loraplex.config import engine_environment
from loraplex.parallel.distributed import DistributedGroup
from loraplex.parallel.group import TPGroup
from loraplex.parallel.rendezvous import Meeting, keep_store

RANKS = 2
#: sums that are launched, or captured, together, so that what starts them falls out
CALLS = 64
REPEATS = 20
LIMIT_S = 60.0
_LOOK_S = 0.02
_HOST = "127.0.0.1"


class SumsFailed(Exception):
    """A rank ended without its times, or did not end."""


class Job(msgspec.Struct, frozen=True):
    """A rank's part. For each of ``rows``: sums of ``[rows, hidden]``, gatherings of ``[rows, vocab_size / size]``."""

    meeting: Meeting
    device: str
    dtype: str
    hidden: int
    vocab_size: int
    rows: tuple[int, ...]
    calls: int
    repeats: int


def time_sums(setting: Setting, hidden: int, vocab_size: int, rows: tuple[int, ...]) -> Iterator[Row]:
    """A row for each size. Raises SumsFailed with what a rank said; OutOfTime."""
    kept = keep_store(_HOST, 0, RANKS, LIMIT_S)
    dtype = str(setting.dtype).removeprefix("torch.")
    calls, repeats = (2, 1) if setting.dry else (CALLS, REPEATS)
    jobs = [
        Job(kept.meeting(rank, RANKS, LIMIT_S), setting.device.type, dtype, hidden, vocab_size, rows, calls, repeats)
        for rank in range(RANKS)
    ]
    limit_s = min(LIMIT_S, max(setting.left_s(), 0.0))
    with ExitStack() as stack:
        ranks = [stack.enter_context(_rank(job)) for job in jobs]
        _wait(ranks, limit_s)
        yield from (msgspec.json.decode(line) for line in ranks[0].answers())


@dataclass(frozen=True, slots=True)
class _Rank:
    """A rank's process and what it says, in files: a pipe that nobody reads would stop it."""

    process: subprocess.Popen[bytes]
    out: IO[bytes]
    errors: IO[bytes]

    def answers(self) -> list[bytes]:
        """The lines that it has written."""
        self.out.seek(0)
        return self.out.read().splitlines()

    def complaint(self) -> str:
        """Its last line on standard error, and what came before that."""
        self.errors.seek(0)
        text = self.errors.read().decode(errors="replace").strip()
        return f"{text.rpartition(chr(10))[2]}\n{text[-2000:]}"


def _wait(ranks: Sequence[_Rank], limit_s: float) -> None:
    """Return when all have ended well. Raises SumsFailed, OutOfTime."""
    deadline = time.monotonic() + limit_s
    while True:
        codes = [rank.process.poll() for rank in ranks]
        for number, code in enumerate(codes):
            if code:  # the first that failed: the others only miss it
                raise SumsFailed(f"rank {number} ended with exit code {code}: {ranks[number].complaint()}")
        if None not in codes:
            return
        if time.monotonic() > deadline:
            if limit_s < LIMIT_S:
                raise OutOfTime("in the sums over ranks")
            raise SumsFailed(f"sums over {len(ranks)} ranks: not done in {limit_s:.0f} s")
        time.sleep(_LOOK_S)


@contextmanager
def _rank(job: Job) -> Iterator[_Rank]:
    """A rank at work; it has ended when the block has."""
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as errors,
    ):
        given.write(msgspec.json.encode(job) + b"\n")
        given.seek(0)
        command = [sys.executable, "-m", "bench.gpu_check.group_sums"]
        environment = engine_environment(0, RANKS)
        with subprocess.Popen(command, stdin=given, stdout=out, stderr=errors, env=environment) as process:
            try:
                yield _Rank(process, out, errors)
            finally:
                process.kill()


def main() -> NoReturn:
    """One rank, from its Job to its end: an abrupt one, because taking a group apart while the other rank does may
    abort, and may wait for graphs that hold its sums."""
    code = 0
    try:
        _measure(msgspec.json.decode(sys.stdin.readline(), type=Job))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _measure(job: Job) -> None:
    device = torch.device(job.device)
    if device.type == "cuda":
        torch.cuda.set_device(job.meeting.rank)
        device = torch.device("cuda", job.meeting.rank)
    store = job.meeting.store()
    group = DistributedGroup(job.meeting, device)
    dtype = getattr(torch, job.dtype)
    check_captured(group, device)
    for rows in job.rows:
        summed = torch.zeros(rows, job.hidden, dtype=dtype, device=device)
        part = torch.zeros(rows, job.vocab_size // group.size, dtype=dtype, device=device)
        ways: dict[str, tuple[torch.Tensor, Callable[[], object]]] = {
            "sum": (summed, lambda summed=summed: group.all_reduce_(summed)),  # type: ignore[misc]
            "gathering": (part, lambda part=part: group.all_gather(part, -1)),  # type: ignore[misc]
        }
        for what, (tensor, call) in ways.items():
            us, replay_us = _times_us(job, device, call)
            row = {"what": f"one {what} over ranks", "ranks": group.size, "rows": rows, "bytes": tensor.nbytes}
            if group.rank == 0:
                print(msgspec.json.encode({**row, "us": us, "replay_us": replay_us}).decode(), flush=True)
    store.set(f"done/{group.rank}", "")
    store.wait([f"done/{rank}" for rank in range(group.size)])


def check_captured(group: TPGroup, device: torch.device) -> None:
    """Raises SumsFailed: a captured sum does not add what is there when it is replayed."""
    tensor = torch.zeros(8, device=device)

    def step() -> None:
        group.all_reduce_(tensor)

    replay = capture_for(device).capture(step)
    for turn in (1, 2):
        tensor.fill_(turn * (group.rank + 1))
        replay()
        wanted = turn * group.size * (group.size + 1) / 2
        if tensor.tolist() != [wanted] * 8:
            raise SumsFailed(f"a captured sum over {group.size} ranks gives {tensor.tolist()}, must be {wanted}")


def _times_us(job: Job, device: torch.device, call: Callable[[], object]) -> tuple[float, float]:
    """Median microseconds of one call: launched one by one, and captured."""

    def calls() -> None:
        for _ in range(job.calls):
            call()

    stopwatch = stopwatch_for(device)
    replay = capture_for(device).capture(calls)
    found = []
    for work in (calls, replay):
        work()
        seconds = [stopwatch.elapsed_s(work) for _ in range(job.repeats)]
        found.append(statistics.median(seconds) / job.calls * 1e6)
    return found[0], found[1]


if __name__ == "__main__":
    main()
