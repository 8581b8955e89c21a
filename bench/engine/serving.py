"""What a speed table does not show: loads beside streams, the time to a ready server, resident memory."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator
from pathlib import Path

import psutil

from bench.engine.in_process import KV_CACHE_BYTES
from bench.engine.record import Measure
from bench.engine.streams import Streams, Work, watch
from bench.engine.through_grpc import GrpcSide, bench_server
from bench.engine.workload import make_job
from loraplex_client import AsyncClient

STREAMS = 16
STREAM_TOKENS = 160
LOADS = 3
STARTS = 3
MIB = 1 << 20


def load_under_traffic(model_dir: Path, adapters: dict[str, Path], folder: Path, dtype: str) -> Iterator[Measure]:
    """Inter-token gaps of 16 streams while adapters are loaded, beside the same streams left alone."""
    names = list(adapters)
    with bench_server(model_dir, {names[0]: adapters[names[0]]}, folder / "load.log", dtype=dtype) as server:
        GrpcSide(server.address).run(make_job(STREAMS, (names[0],), 8, vocab_size=1000, seed="warm"))
        streams = Streams(STREAMS, STREAM_TOKENS, names[0])
        alone = asyncio.run(watch(server.address, streams))
        loads = [_load(f"hot{index}", adapters[name]) for index, name in enumerate(names[1 : 1 + LOADS])]
        loaded = asyncio.run(watch(server.address, streams, loads))
    yield Measure("longest gap, 16 streams alone", alone.worst_over_median(), "median steps")
    yield Measure(
        "longest gap while loading", loaded.worst_over_median(), "median steps", 2.0, f"loads: {loaded.lengths()}"
    )


def _load(name: str, source: Path) -> Work:
    return lambda client: client.load_adapter(name, str(source))


def warm_start(model_dir: Path, adapters: dict[str, Path], folder: Path, dtype: str) -> Iterator[Measure]:
    """From the command to SERVING, model and adapters in the page cache."""
    starts = []
    for _ in range(STARTS):
        with bench_server(model_dir, adapters, folder / "start.log", dtype=dtype) as server:
            starts.append(server.start_s)
    yield Measure("warm start, four adapters", statistics.median(starts), "s", 12.0, f"{STARTS} starts")


def memory(model_dir: Path, adapters: dict[str, Path], folder: Path, dtype: str) -> Iterator[Measure]:
    """Resident memory of the server's processes after a batch of 32, against 1.6 x weights + KV + adapters + 600 MB."""
    with bench_server(model_dir, adapters, folder / "memory.log", dtype=dtype) as server:
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
