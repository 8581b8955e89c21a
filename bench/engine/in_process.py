"""Our engine without any process border: a LocalEngine that turns until the last sequence ends."""

from __future__ import annotations

import time
from pathlib import Path

from bench.engine.workload import Job, Row
from loraplex.config import AdaptersConfig, Config, EngineConfig, ModelConfig
from loraplex.engine.build import build_core
from loraplex.engine.local import Generation, LocalEngine
from loraplex.types import AdapterRef, Request, ResidentMode, SamplingParams, StopRule

KV_CACHE_BYTES = 256 << 20


class EngineSide:
    """An engine with ``adapters`` loaded. ``quantization``: what a dense checkpoint is quantized to at load."""

    def __init__(
        self,
        model_dir: Path,
        adapters: dict[str, Path],
        dtype: str,
        threads: int,
        quantization: str = "",
        *,
        kv_cache_memory: int = KV_CACHE_BYTES,
    ) -> None:
        model = ModelConfig(model=str(model_dir), device="cpu", dtype=dtype, threads=threads, quantization=quantization)
        config = Config(
            model=model,
            engine=EngineConfig(kv_cache_memory=kv_cache_memory),
            adapters=AdaptersConfig(adapter_dirs=tuple(str(path.parent) for path in adapters.values())),
        )
        core = build_core(config, model_dir, "bench", progress=_ignore_progress, wake=_ignore_wake)
        self._engine = LocalEngine(core)
        for name, path in adapters.items():
            self._engine.load_adapter(name, str(path))

    def run(self, job: Job) -> list[list[int]]:
        self._engine.reports.clear()
        generations = self._engine.generate([_request(row, job.num_tokens) for row in job.rows])
        return [_tokens(generation) for generation in generations]

    def serve_merged(self, name: str) -> None:
        """Fold a loaded adapter into the base: requests that use it alone are given that form from now on."""
        self._engine.set_resident_mode(name, ResidentMode.MERGED)

    def decode(self, job: Job) -> list[float]:
        """Run a job, and time each step in which all of its rows decode and nothing else is done: seconds."""
        engine, seconds = self._engine, []
        rows = [engine.generations[engine.submit(_request(row, job.num_tokens))] for row in job.rows]
        while not all(row.over for row in rows):
            engine.reports.clear()
            start = time.perf_counter()
            engine.turn()
            end = time.perf_counter()
            if any(step.decode_tokens == len(rows) and not step.prefill_tokens for step in engine.reports):
                seconds.append(end - start)
        engine.generations.clear()
        assert all(_tokens(row) for row in rows)
        return seconds


def _tokens(generation: Generation) -> list[int]:
    if generation.failure is not None:
        raise generation.failure.to_error()
    return generation.token_ids


def _request(row: Row, num_tokens: int) -> Request:
    return Request(
        request_id="bench",
        prompt_token_ids=row.prompt,
        adapters=(AdapterRef(row.adapter),) if row.adapter else (),
        sampling=SamplingParams(temperature=0.0, seed=0),
        stop=StopRule(max_tokens=num_tokens, ignore_eos=True),
    )


def _ignore_progress(_stage: str, _done: int, _total: int) -> None:
    return None


def _ignore_wake() -> None:
    return None  # the LocalEngine looks for itself
