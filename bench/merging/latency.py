"""Inter-token gaps of streams while adapters are merged and exported, beside those of the same streams left alone.

A real server, its client on the same cores. Each work is done over and over while the streams run, so that it falls on
as many of their steps as it can; quiet turns and works take turns, so that a machine that drifts favours neither.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.engine.record import Measure
from bench.engine.streams import Arrivals, Streams, Work, watch
from bench.engine.through_grpc import GrpcSide, bench_server
from bench.engine.workload import make_job
from loraplex_client import AsyncClient, MergeOptions

QUIET: Final = "quiet"
#: the 99th percentile beside a work is to be at most this many times the quiet one
MOST: Final = 1.5
_MERGES: Final = {
    "cat": MergeOptions("cat"),
    "svd": MergeOptions("svd"),
    "ties_svd": MergeOptions("ties_svd", density=0.5),
}
_EXPORTS: Final = ("peft", "merged")
WORKS: Final = (*(f"merge {name}" for name in _MERGES), *(f"export {name}" for name in _EXPORTS))
#: a merge of the dense changes takes longer than the streams, so that it ends alone
DEFAULT_WORKS: Final = tuple(work for work in WORKS if work != "merge ties_svd")


@dataclass(frozen=True, slots=True)
class LatencyPlan:
    """What is watched: ``streams`` at once, in ``rounds`` of a quiet turn and one of each of ``works``. ``adapters``
    are merged; the first of them is what every other stream uses, and what is exported."""

    model_dir: Path
    dtype: str
    adapters: dict[str, Path]
    works: tuple[str, ...]
    streams: int
    num_tokens: int
    rounds: int

    @property
    def num_turns(self) -> int:
        return (len(self.works) + 1) * self.rounds


@dataclass(slots=True)
class _Found:
    """Of one work: the gaps beside it, and how long each time took."""

    gaps: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def take(self, arrivals: Arrivals) -> None:
        self.gaps += arrivals.near()
        self.seconds += [stop - start for start, stop in arrivals.work]


def latency(plan: LatencyPlan, folder: Path, on_turn: Callable[[str], None]) -> Iterator[Measure]:
    """Serve, watch, and compare. ``on_turn`` is told of each turn before it begins."""
    first, exports = next(iter(plan.adapters)), folder / "exports"
    exports.mkdir()
    streams = Streams(plan.streams, plan.num_tokens, first)
    found = {work: _Found() for work in (QUIET, *plan.works)}
    served = bench_server(
        plan.model_dir, plan.adapters, folder / "server.log", "--export-dir", str(exports), dtype=plan.dtype
    )
    with served as server:
        GrpcSide(server.address).run(make_job(plan.streams, (first,), 8, vocab_size=90, seed="warm"))
        for _ in range(plan.rounds):
            for work, of in found.items():
                on_turn(work)
                pieces = () if work == QUIET else itertools.repeat(_work(work, tuple(plan.adapters), exports))
                of.take(asyncio.run(watch(server.address, streams, pieces)))
    quiet = found.pop(QUIET)
    yield Measure("p99 gap, quiet", _p99(quiet.gaps) * 1e3, "ms", detail=_detail(quiet))
    for work, of in found.items():
        yield Measure(f"p99 gap beside {work}", _p99(of.gaps) / _p99(quiet.gaps), "quiet p99", MOST, _detail(of))


def _work(work: str, names: tuple[str, ...], exports: Path) -> Work:
    does, _, how = work.partition(" ")
    if does == "merge":
        return lambda client: client.merge_adapters("merged", names, _MERGES[how], replace=True)
    return lambda client: _export(client, names[0], exports / "made", how)


async def _export(client: AsyncClient, name: str, destination: Path, format: str) -> None:
    async for _ in client.export_adapter(name, str(destination), format=format):
        pass
    await asyncio.to_thread(shutil.rmtree, destination)


def _p99(gaps: list[float]) -> float:
    return statistics.quantiles(gaps, n=100)[-1]


def _detail(found: _Found) -> str:
    gaps = f"{len(found.gaps)} gaps, median {statistics.median(found.gaps) * 1e3:.1f} ms"
    if not found.seconds:
        return gaps
    times = f"done {len(found.seconds)} times, median {statistics.median(found.seconds):.2f} s"
    return f"{gaps}, p99 {_p99(found.gaps) * 1e3:.1f} ms; {times}"
