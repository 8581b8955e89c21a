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

from bench.gpu_check.decode import Steps, decode_s, engine_for, steps_for
from bench.gpu_check.dummy import DummyAdapters, shape_of, write_config
from bench.gpu_check.section import OutOfTime, Row, Section, Setting
from loraplex.engine.local import LocalEngine
from loraplex_kernels.backend import LORA


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured, the cells that say most first."""

    batches: tuple[int, ...]
    distinct: tuple[int, ...]
    ranks: tuple[int, ...]

    def cells(self) -> Iterator[tuple[int, int]]:
        """(batch, distinct): no more adapters than requests."""
        for distinct in self.distinct:
            for batch in self.batches:
                if distinct <= batch:
                    yield batch, distinct


FULL = Grid((1, 8, 32, 64, 128), (1, 4, 8, 32), (16, 8, 64))
DRY = Grid((1, 3), (1, 2), (4,))
#: a cell, its base side included, takes about a second
CELL_S = 3.0


def run(setting: Setting) -> Iterator[Row]:
    """A row for each backend, rank and cell."""
    grid, steps = (DRY if setting.dry else FULL), steps_for(setting)
    with tempfile.TemporaryDirectory(prefix="loraplex-gpu-check-") as folder:
        model_dir = write_config(shape_of(setting.dry), Path(folder))
        for backend in (name for name in LORA if name.startswith("triton")):
            engine = engine_for(
                setting, model_dir, backend, max(grid.batches), lambda model: DummyAdapters(model, {}).load
            )
            for rank in grid.ranks:
                yield _load_all(engine, backend, rank, max(grid.distinct))
                for batch, distinct in grid.cells():
                    if setting.left_s() < CELL_S and not setting.dry:
                        raise OutOfTime(f"before {backend}, rank {rank}, batch {batch}, {distinct} adapters")
                    yield _cell(engine, steps, backend, rank, (batch, distinct))
                for number in range(max(grid.distinct)):
                    engine.unload_adapter(_name(rank, number))
            del engine
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()


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
        "what": "load of an adapter already on the host: its upload and its probe",
        "backend": backend,
        "rank": rank,
        "bytes": info.bytes,
        "median_ms": best * 1e3,
    }


def _cell(engine: LocalEngine, steps: Steps, backend: str, rank: int, cell: tuple[int, int]) -> Row:
    batch, distinct = cell
    base_s = decode_s(engine, steps, ("",) * batch)
    names = tuple(_name(rank, number * distinct // batch) for number in range(batch))
    adapters_s = decode_s(engine, steps, names)
    again_s = decode_s(engine, steps, ("",) * batch)
    base_s = (base_s + again_s) / 2
    return {"backend": backend, "rank": rank, **retained(cell, base_s, adapters_s)}


def retained(cell: tuple[int, int], base_s: float, adapters_s: float) -> Row:
    """What steps of (sequences, distinct adapters) take without adapters and with them, and what is kept."""
    batch, distinct = cell
    return {
        "batch": batch,
        "distinct": distinct,
        "base_step_ms": base_s * 1e3,
        "step_ms": adapters_s * 1e3,
        "tokens_per_s": batch / adapters_s,
        "retention": base_s / adapters_s,
    }


SECTION = Section("retention", run, 60.0)
