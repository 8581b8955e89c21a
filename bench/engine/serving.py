"""What a speed table does not show: loads and merges beside streams, the time to a ready server, resident memory."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.engine.in_process import KV_CACHE_BYTES
from bench.engine.record import Measure
from bench.engine.through_grpc import GrpcSide, bench_server
from bench.engine.workload import make_job
from loraplex_client import AsyncClient, MergeOptions, Params

STREAMS = 16
STREAM_TOKENS = 160
#: tokens after which the streams are steady: prefill is over
WARM_TOKENS = 16
LOADS = 3
STARTS = 3
MIB = 1 << 20
PROMPT = (10, 20, 30, 40, 50, 60, 70, 80)
#: times that streams are watched alone and beside merges, in turns
MERGE_ROUNDS = 3

Work = Callable[[AsyncClient], Awaitable[object]]
"""What a server is asked beside its streams."""


@dataclass
class Arrivals:
    """When each stream's chunks came, in seconds of one clock, and the windows in which other work ran."""

    times: list[list[float]] = field(default_factory=list)
    work: list[tuple[float, float]] = field(default_factory=list)

    def gaps(self) -> Iterator[tuple[float, float]]:
        """(end, length) of every gap between two chunks of a steady stream."""
        for stream in self.times:
            steady = stream[WARM_TOKENS:]
            for before, after in itertools.pairwise(steady):
                yield after, after - before

    def worst_over_median(self) -> float:
        """The longest gap that touches other work (all gaps when there was none), in median gaps."""
        return max(self.near()) / statistics.median(length for _, length in self.gaps())

    def near(self) -> list[float]:
        """Lengths of the gaps that touch other work; of all gaps when there was none."""
        return [
            length
            for end, length in self.gaps()
            if not self.work or any(start <= end and end - length <= stop for start, stop in self.work)
        ]


def load_under_traffic(model_dir: Path, adapters: dict[str, Path], folder: Path) -> Iterator[Measure]:
    """Inter-token gaps of 16 streams while adapters are loaded, beside the same streams left alone."""
    names = list(adapters)
    with bench_server(model_dir, {names[0]: adapters[names[0]]}, folder / "load.log") as server:
        GrpcSide(server.address).run(make_job(STREAMS, (names[0],), 8, vocab_size=1000, seed="warm"))
        alone = asyncio.run(_watch_streams(server.address, names[0], []))
        loads = [_load(f"hot{index}", adapters[name]) for index, name in enumerate(names[1 : 1 + LOADS])]
        loaded = asyncio.run(_watch_streams(server.address, names[0], loads))
    yield Measure("longest gap, 16 streams alone", alone.worst_over_median(), "median steps")
    yield Measure(
        "longest gap while loading", loaded.worst_over_median(), "median steps", 2.0, f"loads: {_lengths(loaded)}"
    )


def merge_under_traffic(model_dir: Path, adapters: dict[str, Path], folder: Path) -> Iterator[Measure]:
    """The 99th percentile of inter-token gaps of 16 streams while adapters merge, over that of the streams alone."""
    first = next(iter(adapters))
    with bench_server(model_dir, adapters, folder / "merge.log") as server:
        GrpcSide(server.address).run(make_job(STREAMS, (first,), 8, vocab_size=1000, seed="warm"))
        for method in ("cat", "svd"):
            alone: list[float] = []
            beside: list[float] = []
            lengths: list[str] = []
            for _ in range(MERGE_ROUNDS):
                alone += asyncio.run(_watch_streams(server.address, first, [])).near()
                merged = asyncio.run(_watch_streams(server.address, first, [_merge(method, tuple(adapters))]))
                beside += merged.near()
                lengths.append(_lengths(merged))
            ratio = _p99(beside) / _p99(alone)
            detail = f"p99 {_p99(alone) * 1e3:.0f} ms alone; merges: {', '.join(lengths)}"
            yield Measure(f"p99 gap while four adapters merge ({method})", ratio, "p99 alone", 1.5, detail)


def _load(name: str, source: Path) -> Work:
    return lambda client: client.load_adapter(name, str(source))


def _merge(method: str, names: Sequence[str]) -> Work:
    options = MergeOptions(method)
    return lambda client: client.merge_adapters("merged", names, options, replace=True)


def _p99(lengths: list[float]) -> float:
    return statistics.quantiles(lengths, n=100)[-1]


def _lengths(arrivals: Arrivals) -> str:
    return ", ".join(f"{stop - start:.2f} s" for start, stop in arrivals.work)


async def _watch_streams(address: str, adapter: str, work: Sequence[Work]) -> Arrivals:
    arrivals = Arrivals()
    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        for index in range(STREAMS):
            arrivals.times.append([])
            group.create_task(_note(client, "" if index % 2 else adapter, index, arrivals.times[index]))
        while min(len(times) for times in arrivals.times) < WARM_TOKENS + 8:
            await asyncio.sleep(0.02)
        for ask in work:
            start = time.monotonic()
            await ask(client)
            arrivals.work.append((start, time.monotonic()))
    return arrivals


async def _note(client: AsyncClient, adapter: str, index: int, times: list[float]) -> None:
    # with ids asked for, a token whose text is held back is still a chunk
    params = Params(max_tokens=STREAM_TOKENS, ignore_eos=True, token_ids=True)
    async for _ in client.stream((*PROMPT, index), params, adapters=adapter):
        times.append(time.monotonic())


def warm_start(model_dir: Path, adapters: dict[str, Path], folder: Path) -> Iterator[Measure]:
    """From the command to SERVING, model and adapters in the page cache."""
    starts = []
    for _ in range(STARTS):
        with bench_server(model_dir, adapters, folder / "start.log") as server:
            starts.append(server.start_s)
    yield Measure("warm start, four adapters", statistics.median(starts), "s", 12.0, f"{STARTS} starts")


def memory(model_dir: Path, adapters: dict[str, Path], folder: Path) -> Iterator[Measure]:
    """Resident memory of the server's processes after a batch of 32, against 1.6 x weights + KV + adapters + 600 MB."""
    with bench_server(model_dir, adapters, folder / "memory.log") as server:
        GrpcSide(server.address).run(make_job(32, tuple(adapters), 32, vocab_size=1000, seed="memory"))
        resident = sum(process.memory_info().rss for process in _processes(server.pid))
        weights, adapter_bytes = asyncio.run(_declared(server.address))
    allowed = 1.6 * weights + KV_CACHE_BYTES + adapter_bytes + 600e6
    detail = f"weights {weights / MIB:.0f}, KV {KV_CACHE_BYTES / MIB:.0f}, adapters {adapter_bytes / MIB:.0f} MiB"
    yield Measure("resident memory", resident / MIB, "MiB", allowed / MIB, detail)


def _processes(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


async def _declared(address: str) -> tuple[int, int]:
    async with AsyncClient(address) as client:
        model, adapters = await client.model(), await client.list_adapters()
    return model.weight_bytes, sum(adapter.bytes for adapter in adapters)
