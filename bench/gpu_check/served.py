"""An engine as a server has it: a process of its own, and one more for each other rank. Nothing here waits for ever."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bench.gpu_check.decode import Steps, request_of
from bench.gpu_check.section import OutOfTime, Setting
from loraplex.config import Config
from loraplex.engine.client import EngineClient
from loraplex.engine.messages import StepReport
from loraplex.engine.start import start_engine
from loraplex.types import ModelInfo, Request, TokenLogprob

#: a start makes weights and captures graphs; everything else takes a few seconds at most. What has never run may hang
START_S = 90.0
WORK_S = 30.0

T = TypeVar("T")


class Hung(Exception):
    """An engine that did not do what it was asked for, or not in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's tokens, and their logprobs where it asked for them."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


@contextmanager
def served(setting: Setting, config: Config) -> Iterator[ServedEngine]:
    """The engine, ready; it and its ranks have ended when the block has.

    Raises the LoraplexError that it did not start for; Hung, or OutOfTime where the check's own time ran out.
    """
    with asyncio.Runner() as runner:
        bounds = _Bounds(setting, runner)
        what = f"the start of {config.model.tensor_parallel_size} rank(s), graphs {config.engine.graphs}"
        start = start_engine(config, Path(config.model.model), "dummy", lambda _: None)
        client = bounds.run(what, start, START_S)
        try:
            yield ServedEngine(client, bounds)
        finally:
            runner.run(client.close())  # bounded by itself


class ServedEngine:
    """Its calls return when it is done, or raise Hung or OutOfTime. Made by ``served``."""

    def __init__(self, client: EngineClient, bounds: _Bounds) -> None:
        self._client = client
        self._bounds = bounds
        self._times_s: list[float] = []
        self._batch = 0
        self._begun = False
        self._enough = asyncio.Event()
        self._wanted = 0
        client.on_report(self._take_report)

    @property
    def model(self) -> ModelInfo:
        return self._client.model

    def load(self, name: str, source: Path) -> None:
        """Load an adapter from its directory."""
        self._bounds.run(f"the load of {name}", self._client.load_adapter(name, str(source)), WORK_S)

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """What becomes of requests that are sent at once."""
        return self._bounds.run(f"the answers to {len(requests)} requests", self._answers(requests), WORK_S)

    def step_s(self, adapters: Sequence[str], steps: Steps) -> float:
        """Median seconds of a decode step of one request for each of ``adapters``, by the engine's own clock."""
        return self._bounds.run(f"{steps.timed} steps of {len(adapters)}", self._step_s(adapters, steps), WORK_S)

    async def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        return list(await asyncio.gather(*map(self._answer, requests)))

    async def _answer(self, request: Request) -> Answer:
        token_ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        async for event in self._client.generate(request):
            token_ids += event.token_ids
            logprobs += event.logprobs
        return Answer(tuple(token_ids), tuple(logprobs))

    async def _step_s(self, adapters: Sequence[str], steps: Steps) -> float:
        self._batch, self._begun, self._wanted = len(adapters), False, steps.warm + steps.timed
        self._enough.clear()
        self._times_s.clear()
        requests = [request_of(index, name, steps) for index, name in enumerate(adapters)]
        running = [asyncio.create_task(self._answer(request)) for request in requests]
        enough = asyncio.create_task(self._enough.wait())
        try:
            done, _ = await asyncio.wait({*running, enough}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {enough}:
                task.result()  # what it failed with
        finally:
            for task in (*running, enough):
                task.cancel()
            await asyncio.gather(*running, enough, return_exceptions=True)
        if len(self._times_s) < self._wanted:
            raise Hung(f"{self._batch} requests decoded together for {len(self._times_s)} steps, not {self._wanted}")
        return statistics.median(self._times_s[steps.warm : self._wanted])

    def _take_report(self, report: StepReport) -> None:
        if report.prefill_tokens:
            self._begun = True
            self._times_s.clear()
        elif self._begun and report.decode_tokens == self._batch:  # before that they are the last batch's
            self._times_s.append(report.step_s)
            if len(self._times_s) >= self._wanted:
                self._enough.set()


class _Bounds:
    """Runs what must end."""

    def __init__(self, setting: Setting, runner: asyncio.Runner) -> None:
        self._setting = setting
        self._runner = runner

    def run(self, what: str, work: Coroutine[object, object, T], limit_s: float) -> T:
        """Its result within ``limit_s``, or within the check's time."""
        left_s = max(self._setting.left_s(), 0.0)
        try:
            return self._runner.run(asyncio.wait_for(work, min(limit_s, left_s)))
        except TimeoutError:
            if left_s < limit_s:
                raise OutOfTime(f"in {what}") from None
            raise Hung(f"{what}: not done in {limit_s:.0f} s") from None
