"""One load from the first call to the last: what is there, warm-up, the runs in turns, the metrics around each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from bench.serve.compare import ALL, REQUESTS, MetricsUnreadable, Scrape, scrape
from bench.serve.load import OK, UNFINISHED, Halt, Load, Outcome, Played, Stop
from bench.serve.options import Options
from bench.serve.progress import LoadProgress
from bench.serve.schedule import Planned, base_only, make_schedule, warm_up_schedule
from bench.serve.workload import Side, Workload
from loraplex_client import Adapter, Model, ServerError

_ASK_S: Final = 10.0
_WARM_UP_CONCURRENCY: Final = 8
#: a cancelled request may reach the server's counters a little later than the client's
_SETTLE_S: Final = 3.0
_SHOWN_NAMES: Final = 20


class CannotLoad(Exception):
    """The server is not there, or answers no request."""


class ImpossibleOptions(Exception):
    """What the options ask for is not to be had of this server."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One run as it went."""

    side: Side
    repeat: int
    started_s: float
    played: Played
    #: what the server counted in it; None without a metrics address
    window: Scrape | None


@dataclass
class Session:
    """What a load found. Owned by ``measure``."""

    model: Model
    adapters: dict[str, Adapter]
    runs: list[Measured] = field(default_factory=list)
    warm_up: Sequence[Outcome] = ()
    started_at: float = field(default_factory=time.time)
    finished_at: float = 0.0


def runs_in_turn(workload: Workload) -> Iterator[tuple[int, Side]]:
    """(repeat, side) in the order they run: who goes first changes with every repeat, so that a drift favours none."""
    for repeat in range(1, workload.repeats + 1):
        sides = workload.sides
        for side in sides if repeat % 2 else reversed(sides):
            yield repeat, side


async def measure(options: Options, halt: Halt, progress: LoadProgress) -> Session:
    """Load the server. ``halt`` ends it early, with what there is until then.

    Raises:
        ImpossibleOptions: the server has no such adapter, or takes no such lengths.
        CannotLoad: there is no server, or it answers no request.
        MetricsUnreadable: the metrics address is not one.
    """
    load = Load(options.server, options.timeout_s, halt)
    try:
        session = await _survey(load, options)
        if options.metrics:
            await asyncio.to_thread(scrape, options.metrics)
        if options.max_seconds is not None:
            _stop_after(options.max_seconds, halt)
        await _warm_up(load, options, session, progress)
        start = time.monotonic()
        for repeat, side in runs_in_turn(options.workload):
            if halt.stop is not None:
                break
            schedule = make_schedule(options.workload, repeat, session.model.vocab_size)
            progress.begin(f"run {repeat} of {options.workload.repeats}, {_side_name(side)}", len(schedule))
            started_s = time.monotonic() - start
            played, window = await _run(load, options, base_only(schedule) if side == "base" else schedule, progress)
            session.runs.append(Measured(side, repeat, started_s, played, window))
        session.finished_at = time.time()
        return session
    finally:
        await load.close()


async def _run(
    load: Load, options: Options, schedule: Sequence[Planned], progress: LoadProgress
) -> tuple[Played, Scrape | None]:
    before = await _scrape(options.metrics)
    played = await load.play(schedule, options.workload.arrival.concurrency, progress.ended)
    return played, before and await _settled(options.metrics, before, len(played.outcomes))


async def _settled(url: str, before: Scrape, sent: int) -> Scrape | None:
    """What was counted since ``before``, once that is all that was sent; None when the server is gone."""
    deadline = time.monotonic() + _SETTLE_S
    while (after := await _scrape(url)) is not None:
        window = after.since(before)
        if window.value(REQUESTS, ALL) >= sent or time.monotonic() > deadline:
            return window
        await asyncio.sleep(0.05)
    return None


async def _scrape(url: str) -> Scrape | None:
    """None without an address, or when it answers no more: what was measured until then is worth more than this."""
    try:
        return await asyncio.to_thread(scrape, url) if url else None
    except MetricsUnreadable:
        return None


async def _survey(load: Load, options: Options) -> Session:
    """Ask the server what it serves, and refuse what it cannot do."""
    try:
        model = await load.client.model(timeout=_ASK_S)
        loaded = {adapter.name: adapter for adapter in await load.client.list_adapters(timeout=_ASK_S)}
    except ServerError as error:
        raise CannotLoad(f"--server {options.server}: {error.code.name}: {error}") from error
    workload = options.workload
    ready = [name for name, adapter in loaded.items() if adapter.state == "ready"]
    unknown = [name for name in workload.adapters if name not in ready]
    if unknown:
        there = ", ".join(ready[:_SHOWN_NAMES]) + (" ..." if len(ready) > _SHOWN_NAMES else "") or "none"
        raise ImpossibleOptions(
            f"--adapters: {', '.join(unknown[:_SHOWN_NAMES])}: not ready on {options.server}; ready there: {there}"
        )
    longest = workload.prompt_tokens.high + workload.output_tokens.high
    if longest > model.max_model_len:
        raise ImpossibleOptions(
            f"--prompt-tokens {workload.prompt_tokens} and --output-tokens {workload.output_tokens} make sequences of "
            f"up to {longest} tokens; {model.id} takes up to {model.max_model_len}"
        )
    return Session(model, {name: loaded[name] for name in workload.adapters})


async def _warm_up(load: Load, options: Options, session: Session, progress: LoadProgress) -> None:
    schedule = warm_up_schedule(options.workload, session.model.vocab_size)
    if not schedule:
        return
    progress.begin("warm-up", len(schedule))
    played = await load.play(schedule, min(_WARM_UP_CONCURRENCY, len(schedule)), progress.ended)
    session.warm_up = played.outcomes
    ended = [outcome for outcome in played.outcomes if outcome.code != UNFINISHED]
    if ended and all(outcome.code != OK for outcome in ended):
        (code, message), _ = Counter((outcome.code, outcome.message) for outcome in ended).most_common(1)[0]
        raise CannotLoad(f"--server {options.server}: every warm-up request failed: {code}: {message}")


def _stop_after(seconds: float, halt: Halt) -> None:
    stop = Stop("time", f"--max-seconds {seconds:g} passed")
    asyncio.get_running_loop().call_later(seconds, halt.request, stop)


def _side_name(side: Side) -> str:
    return "base model alone" if side == "base" else "adapters"
