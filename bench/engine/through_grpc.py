"""Our server from a client on the same cores: one stream per row."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.engine.in_process import KV_CACHE_BYTES
from bench.engine.workload import Job, Row
from loraplex.demo.server_process import ServerProcess, running_server
from loraplex_client import AsyncClient, Params


class GrpcSide:
    """The server at ``address``, with the adapters of the job loaded."""

    def __init__(self, address: str) -> None:
        self._address = address

    def run(self, job: Job) -> list[list[int]]:
        return asyncio.run(self._run(job))

    async def _run(self, job: Job) -> list[list[int]]:
        async with AsyncClient(self._address) as client:
            return await asyncio.gather(*(_stream(client, row, job.num_tokens) for row in job.rows))


async def _stream(client: AsyncClient, row: Row, num_tokens: int) -> list[int]:
    tokens: list[int] = []
    params = Params(max_tokens=num_tokens, ignore_eos=True, token_ids=True)
    async for chunk in client.stream(row.prompt, params, adapters=row.adapter):
        tokens.extend(chunk.token_ids)
    return tokens


@contextmanager
def bench_server(
    model_dir: Path, adapters: dict[str, Path], log: Path, *options: str, dtype: str
) -> Iterator[ServerProcess]:
    """A server on ``model_dir`` with ``adapters`` loaded, and further ``options``."""
    arguments = [*options, "--model", str(model_dir), "--dtype", dtype, "--kv-cache-memory", str(KV_CACHE_BYTES)]
    for name, path in adapters.items():
        arguments += ["--adapter", f"{name}={path}"]
    for directory in {str(path.parent) for path in adapters.values()}:
        arguments += ["--adapter-dir", directory]
    with running_server(arguments, log=log) as server:
        yield server
