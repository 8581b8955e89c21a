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

    def decode(self, job: Job) -> tuple[int, float]:
        """Run a job, and time what comes after the step in which its last row gets its first token: how many tokens
        that were, and the seconds."""
        engine = self._engine
        engine.reports.clear()
        rows = [engine.generations[engine.submit(_request(row, job.num_tokens))] for row in job.rows]
        while not all(row.token_ids or row.over for row in rows):
            engine.turn()
        begun = sum(len(row.token_ids) for row in rows)
        start = time.perf_counter()
        engine.run_until_idle()
        seconds = time.perf_counter() - start
        engine.generations.clear()
        return sum(len(_tokens(row)) for row in rows) - begun, seconds


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
