"""Decode speed of the whole engine on an 8B-shaped model, with adapters and without: the number that counts.

Both sides of a ratio are the same engine, one after the other: a batch of base-only requests, then the same batch with
its requests spread evenly over so many distinct adapters of one rank.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu_check.captures import capture_for
from bench.gpu_check.dummy import DummyAdapters, shape_of, write_config
from bench.gpu_check.section import OutOfTime, Row, Section, Setting
from loraplex.config import AdaptersConfig, Config, EngineConfig, ModelConfig
from loraplex.engine.build import Means, build_core
from loraplex.engine.local import LocalEngine
from loraplex.types import AdapterRef, Request, SamplingParams, StopRule
from loraplex_kernels.backend import LORA


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured, the cells that say most first."""

    batches: tuple[int, ...]
    distinct: tuple[int, ...]
    ranks: tuple[int, ...]
    prompt_tokens: int
    steps: int
    """Timed decode steps of a batch, after ``warm_steps`` of them."""
    warm_steps: int

    def cells(self) -> Iterator[tuple[int, int]]:
        """(batch, distinct): no more adapters than requests."""
        for distinct in self.distinct:
            for batch in self.batches:
                if distinct <= batch:
                    yield batch, distinct


FULL = Grid((1, 8, 32, 64, 128), (1, 4, 8, 32), (16, 8, 64), prompt_tokens=64, steps=40, warm_steps=4)
DRY = Grid((1, 3), (1, 2), (4,), prompt_tokens=5, steps=2, warm_steps=1)
#: a cell, its base side included, takes about a second
CELL_S = 3.0


def run(setting: Setting) -> Iterator[Row]:
    """A row for each backend, rank and cell."""
    grid = DRY if setting.dry else FULL
    with tempfile.TemporaryDirectory(prefix="loraplex-gpu-check-") as folder:
        model_dir = write_config(shape_of(setting.dry), Path(folder))
        for backend in (name for name in LORA if name.startswith("triton")):
            engine = _engine(setting, grid, model_dir, backend)
            for rank in grid.ranks:
                yield _load_all(engine, backend, rank, max(grid.distinct))
                for batch, distinct in grid.cells():
                    if setting.left_s() < CELL_S and not setting.dry:
                        raise OutOfTime(f"before {backend}, rank {rank}, batch {batch}, {distinct} adapters")
                    yield _cell(engine, grid, backend, rank, (batch, distinct))
                for number in range(max(grid.distinct)):
                    engine.unload_adapter(_name(rank, number))
            del engine
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()


def _engine(setting: Setting, grid: Grid, model_dir: Path, backend: str) -> LocalEngine:
    gib = 1 << 30
    config = Config(
        model=ModelConfig(
            model=str(model_dir),
            device=setting.device.type,
            dtype=str(setting.dtype).removeprefix("torch."),
            load_format="dummy",
            max_model_len=(64 if setting.dry else 512),
        ),
        engine=EngineConfig(
            max_num_seqs=max(grid.batches),
            max_num_batched_tokens=64 if setting.dry else 4096,
            prefix_cache=False,  # the same prompts come again and again
            kv_cache_memory=(1 << 20) if setting.dry else 12 * gib,
            lora_backend=backend,
            attention_backend="triton" if setting.dry else "auto",
            graphs="on",
        ),
        adapters=AdaptersConfig(adapter_memory=(1 << 24) if setting.dry else 14 * gib),
    )
    means = Means(capture_for(setting.device), lambda _config, model: DummyAdapters(model, {}).load)
    core = build_core(config, model_dir, "dummy", progress=lambda *_: None, wake=lambda: None, means=means)
    return LocalEngine(core)


def _name(rank: int, number: int) -> str:
    return f"r{rank}-{number}"


def _load_all(engine: LocalEngine, backend: str, rank: int, count: int) -> Row:
    """Load adapters one by one; the first also makes their random values, so it is not in the median."""
    seconds = []
    for number in range(count):
        start = time.perf_counter()
        info = engine.load_adapter(_name(rank, number), f"{rank}/{number}")
        seconds.append(time.perf_counter() - start)
    best = sorted(seconds[1:] or seconds)[len(seconds[1:] or seconds) // 2]
    return {
        "what": "upload of an adapter already on the host",
        "backend": backend,
        "rank": rank,
        "bytes": info.bytes,
        "median_ms": best * 1e3,
        "GB_per_s": info.bytes / best / 1e9,
    }


def _cell(engine: LocalEngine, grid: Grid, backend: str, rank: int, cell: tuple[int, int]) -> Row:
    batch, distinct = cell
    base_s = _decode_s(engine, grid, ("",) * batch)
    names = tuple(_name(rank, number * distinct // batch) for number in range(batch))
    adapters_s = _decode_s(engine, grid, names)
    again_s = _decode_s(engine, grid, ("",) * batch)
    base_s = (base_s + again_s) / 2
    return {
        "backend": backend,
        "rank": rank,
        "batch": batch,
        "distinct": distinct,
        "base_step_ms": base_s * 1e3,
        "step_ms": adapters_s * 1e3,
        "tokens_per_s": batch / adapters_s,
        "retention": base_s / adapters_s,
    }


def _decode_s(engine: LocalEngine, grid: Grid, adapters: tuple[str, ...]) -> float:
    """Seconds of a decode step of ``len(adapters)`` requests, all of them past their prompts."""
    tickets = [engine.submit(_request(index, name, grid)) for index, name in enumerate(adapters)]
    generations = [engine.generations[ticket] for ticket in tickets]

    def turn_until(tokens: int) -> None:
        while min(len(generation.token_ids) for generation in generations) < tokens:
            engine.turn()
            failed = next((g.failure for g in generations if g.failure is not None), None)
            if failed is not None:
                raise failed.to_error()

    turn_until(grid.warm_steps)
    # the first request of a large batch is some steps ahead of the last: count what all of them get
    before = sum(len(generation.token_ids) for generation in generations)
    start = time.perf_counter()
    turn_until(grid.warm_steps + grid.steps)
    seconds = time.perf_counter() - start
    tokens = sum(len(generation.token_ids) for generation in generations) - before
    for ticket in tickets:
        engine.abort(ticket)
    engine.run_until_idle()
    for ticket in tickets:
        del engine.generations[ticket]
    return seconds / (tokens / len(adapters))


def _request(index: int, adapter: str, grid: Grid) -> Request:
    prompt = tuple((index * 31 + position * 7) % 89 for position in range(grid.prompt_tokens))
    return Request(
        request_id="check",
        prompt_token_ids=prompt,
        adapters=(AdapterRef(adapter),) if adapter else (),
        sampling=SamplingParams(temperature=0.0, seed=0),
        stop=StopRule(max_tokens=grid.warm_steps + grid.steps + 64, ignore_eos=True),
    )


SECTION = Section("retention", run, 60.0)
