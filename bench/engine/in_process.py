"""Our engine without any process border: commands in, turns until the last sequence ends."""

from __future__ import annotations

import threading
from pathlib import Path

from loraplex.engine.build import build_core

from bench.engine.workload import Job
from loraplex.config import AdaptersConfig, Config, EngineConfig, ModelConfig
from loraplex.engine.messages import LoadAdapter, Outputs, Reply, Submit, ToFrontEnd, TokenEvent
from loraplex.types import AdapterRef, Request, SamplingParams, StopRule

FRONTEND = b"bench"
KV_CACHE_BYTES = 256 << 20


class EngineSide:
    """An EngineCore with ``adapters`` loaded."""

    def __init__(self, model_dir: Path, adapters: dict[str, Path], dtype: str, threads: int) -> None:
        config = Config(
            model=ModelConfig(model=str(model_dir), device="cpu", dtype=dtype, threads=threads),
            engine=EngineConfig(kv_cache_memory=KV_CACHE_BYTES),
            adapters=AdaptersConfig(adapter_dirs=tuple(str(path.parent) for path in adapters.values())),
        )
        self._woken = threading.Event()
        self._core = build_core(config, model_dir, "bench", progress=_ignore_progress, wake=self._woken.set)
        self._next_ticket = 1
        for name, path in adapters.items():
            self._load(name, path)

    def run(self, job: Job) -> list[list[int]]:
        first = self._next_ticket
        for row in job.rows:
            self._core.handle(FRONTEND, Submit(self._next_ticket, _request(row.adapter, row.prompt, job.num_tokens)))
            self._next_ticket += 1
        outputs: dict[int, list[int]] = {ticket: [] for ticket in range(first, self._next_ticket)}
        waiting = len(outputs)
        while waiting:
            for event in self._turn_for_events():
                outputs[event.ticket].extend(event.token_ids)
                if event.failure is not None:
                    raise event.failure.to_error()
                waiting -= event.terminal
        return list(outputs.values())

    def _load(self, name: str, path: Path) -> None:
        self._core.handle(FRONTEND, LoadAdapter(op=0, name=name, source=str(path)))
        while True:
            self._woken.wait(timeout=0.05)
            self._woken.clear()
            replies = [message for message in self._turn() if isinstance(message, Reply)]
            if replies:
                if replies[0].failure is not None:
                    raise replies[0].failure.to_error()
                return

    def _turn_for_events(self) -> list[TokenEvent]:
        return [event for message in self._turn() if isinstance(message, Outputs) for event in message.events]

    def _turn(self) -> list[ToFrontEnd]:
        self._core.turn()
        to_each, _ = self._core.take_outputs()
        return to_each.get(FRONTEND, [])


def _request(adapter: str, prompt: tuple[int, ...], num_tokens: int) -> Request:
    return Request(
        request_id="bench",
        prompt_token_ids=prompt,
        adapters=(AdapterRef(adapter),) if adapter else (),
        sampling=SamplingParams(temperature=0.0, seed=0),
        stop=StopRule(max_tokens=num_tokens, ignore_eos=True),
    )


def _ignore_progress(_stage: str, _done: int, _total: int) -> None:
    return None
