"""A client where the server is, which may be where the tests cannot reach it: ``python -m tests.far_client ADDRESS``.

Takes what to do as JSON on standard input, and answers in JSON: the tokens of each generation, all of them in flight
together.
"""

from __future__ import annotations

import asyncio
import sys
import time

import msgspec

from loraplex_client import AsyncClient, Params, Unavailable
from loraplex_client.results import Result


class Generation(msgspec.Struct, frozen=True):
    """One request."""

    prompt: list[int]
    adapters: dict[str, float]
    max_tokens: int


class Work(msgspec.Struct, frozen=True):
    """What to do. ``retry_s``: how long a server that says UNAVAILABLE is asked again."""

    load: dict[str, str]
    generate: list[Generation]
    retry_s: float = 0.0


async def do(address: str, work: Work) -> list[list[int]]:
    """Load all, then generate all."""
    async with AsyncClient(address) as client:
        await asyncio.gather(*(client.load_adapter(name, source) for name, source in work.load.items()))
        results = await asyncio.gather(*(_generate(client, asked, work.retry_s) for asked in work.generate))
    return [list(result.token_ids) for result in results]


async def _generate(client: AsyncClient, asked: Generation, retry_s: float) -> Result:
    params = Params(max_tokens=asked.max_tokens, ignore_eos=True, token_ids=True)
    deadline = time.monotonic() + retry_s
    while True:
        try:
            return await client.generate(asked.prompt, params, adapters=asked.adapters)
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


if __name__ == "__main__":
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Work)
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(do(sys.argv[1], asked))))
