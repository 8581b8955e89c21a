"""What a speed table does not show: a load beside running streams, the time to a ready server, resident memory."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.engine.in_process import KV_CACHE_BYTES
from bench.engine.record import Measure
from bench.engine.through_grpc import GrpcSide, bench_server
from bench.engine.workload import make_job
from loraplex_client import AsyncClient, Params

STREAMS = 16
STREAM_TOKENS = 160
#: tokens after which the streams are steady: prefill is over
WARM_TOKENS = 16
LOADS = 3
STARTS = 3
MIB = 1 << 20
PROMPT = (10, 20, 30, 40, 50, 60, 70, 80)


@dataclass
class Arrivals:
    """When each stream's chunks came, in seconds of one clock, and the window in which loads ran."""

    times: list[list[float]] = field(default_factory=list)
    loads: list[tuple[float, float]] = field(default_factory=list)

    def gaps(self) -> Iterator[tuple[float, float]]:
        """(end, length) of every gap between two chunks of a steady stream."""
        for stream in self.times:
            steady = stream[WARM_TOKENS:]
            for before, after in itertools.pairwise(steady):
                yield after, after - before

    def worst_over_median(self) -> float:
        """The longest gap that touches a load (all gaps when none ran), in median gaps."""
        gaps = list(self.gaps())
        median = statistics.median(length for _, length in gaps)
        near = [
            length
            for end, length in gaps
            if not self.loads or any(start <= end and end - length <= stop for start, stop in self.loads)
        ]
        return max(near) / median


def load_under_traffic(model_dir: Path, adapters: dict[str, Path], folder: Path) -> Iterator[Measure]:
    """Inter-token gaps of 16 streams while adapters are loaded, beside the same streams left alone."""
    names = list(adapters)
    with bench_server(model_dir, {names[0]: adapters[names[0]]}, folder / "load.log") as server:
        GrpcSide(server.address).run(make_job(STREAMS, (names[0],), 8, vocab_size=1000, seed="warm"))
        alone = asyncio.run(_watch_streams(server.address, names[0], []))
        sources = [str(adapters[name]) for name in names[1 : 1 + LOADS]]
        loaded = asyncio.run(_watch_streams(server.address, names[0], sources))
    loads = ", ".join(f"{stop - start:.2f} s" for start, stop in loaded.loads)
    yield Measure("longest gap, 16 streams alone", alone.worst_over_median(), "median steps")
    yield Measure(
        "longest gap while loading", loaded.worst_over_median(), "median steps", 2.0, f"{len(sources)} loads: {loads}"
    )


async def _watch_streams(address: str, adapter: str, sources: list[str]) -> Arrivals:
    arrivals = Arrivals()
    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        for index in range(STREAMS):
            arrivals.times.append([])
            group.create_task(_note(client, "" if index % 2 else adapter, index, arrivals.times[index]))
        while min(len(times) for times in arrivals.times) < WARM_TOKENS + 8:
            await asyncio.sleep(0.02)
        for number, source in enumerate(sources):
            start = time.monotonic()
            await client.load_adapter(f"hot{number}", source)
            arrivals.loads.append((start, time.monotonic()))
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
