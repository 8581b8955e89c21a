"""Streams of a server as their client sees them: when each token came, and what else the server did meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field

from loraplex_client import AsyncClient, Params

#: tokens after which the streams are steady: prefill is over
WARM_TOKENS = 16
PROMPT = (10, 20, 30, 40, 50, 60, 70, 80)

Work = Callable[[AsyncClient], Awaitable[object]]
"""What a server is asked beside its streams."""


@dataclass(frozen=True, slots=True)
class Streams:
    """``count`` greedy streams of ``num_tokens`` tokens each; every other one, from the first on, uses ``adapter``."""

    count: int
    num_tokens: int
    adapter: str


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

    def lengths(self) -> str:
        """How long each piece of work took."""
        return ", ".join(f"{stop - start:.2f} s" for start, stop in self.work)


async def watch(address: str, streams: Streams, work: Iterable[Work] = ()) -> Arrivals:
    """Run ``streams`` on the server at ``address``, and once all are steady the pieces of ``work``, one after the
    other; none is begun when a stream has ended."""
    arrivals = Arrivals([[] for _ in range(streams.count)])
    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        running = [
            group.create_task(_note(client, streams, index, times)) for index, times in enumerate(arrivals.times)
        ]
        while min(len(times) for times in arrivals.times) < WARM_TOKENS + 8:
            await asyncio.sleep(0.02)
        for ask in work:
            if any(stream.done() for stream in running):
                break
            start = time.monotonic()
            await ask(client)
            arrivals.work.append((start, time.monotonic()))
    return arrivals


async def _note(client: AsyncClient, streams: Streams, index: int, times: list[float]) -> None:
    # with ids asked for, a token whose text is held back is still a chunk
    params = Params(max_tokens=streams.num_tokens, ignore_eos=True, token_ids=True)
    async for _ in client.stream((*PROMPT, index), params, adapters="" if index % 2 else streams.adapter):
        times.append(time.monotonic())
