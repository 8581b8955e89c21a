"""Quantized products on this card: microseconds and share of a copy's speed, alone and joined with adapters; and the
whole engine on a model quantized to nf4.

What memory has to move for a product: codes and scales, x and y once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from bench.gpu_check.decode import decode_s, engine_for, steps_for
from bench.gpu_check.dummy import DummyAdapters, shape_of, write_config
from bench.gpu_check.retention import retained
from bench.gpu_check.section import OutOfTime, Row, Section, Setting
from bench.limits.shapes import LLAMA_8B, PackedLayer
from bench.ops.quant_matrices import STORED, in_other_memory, random_matrix
from bench.ops.shapes import even_traffic
from bench.ops.timing import Stopwatch, Timing, Way, WrongResult, measure, num_sets, stopwatch_for
from loraplex_kernels.backend import choose_lora, choose_quant
from loraplex_kernels.lora import Factors, PartDelta, SlotDelta
from loraplex_kernels.quant.stored import StoredMatrix, decode
from loraplex_kernels.testing import random_factors, worst_excess

#: the form that is measured at every layer and size of step; each other one costs a compilation for each
MAIN = "nf4"
QUANTIZATION = "nf4"
RANK = 16
CELL_S = 3.0


@dataclass(frozen=True, slots=True)
class Grid:
    """``others``: layer and rows at which the other forms are measured; ``joined``: (rows, distinct adapters)."""

    layers: tuple[PackedLayer, ...]
    rows: tuple[int, ...]
    others: tuple[tuple[int, int], ...]
    joined: tuple[tuple[int, int], ...]
    served: tuple[tuple[int, int], ...]
    repeats: int


FULL = Grid(
    LLAMA_8B.packed_layers,
    (1, 8, 32, 128),
    others=((2, 1), (2, 32)),
    joined=((1, 1), (8, 8), (32, 1), (32, 8)),
    served=((1, 1), (8, 1), (8, 8), (32, 8), (64, 8)),
    repeats=9,
)
DRY = Grid((PackedLayer("qkv", 256, (32, 16, 16)),), (1, 3), ((0, 3),), ((3, 2),), ((1, 1),), 1)


def run(setting: Setting) -> Iterator[Row]:
    """A row for each form, layer, size of step and way. Raises WrongResult before the time of a wrong one is told."""
    grid, stopwatch = DRY if setting.dry else FULL, stopwatch_for(setting.device)
    copy = stopwatch.copy_bytes_per_s()
    cells = [(MAIN, layer, rows) for layer in grid.layers for rows in grid.rows]
    cells += [(name, grid.layers[at], rows) for name in STORED if name != MAIN for at, rows in grid.others]
    for name, layer, rows in cells:
        bench = _Bench(setting, stopwatch, layer, name, rows)
        yield from _rows(bench, bench.products(dense=name == MAIN), grid.repeats, copy)
    for layer in grid.layers:
        for rows, distinct in grid.joined:
            bench = _Bench(setting, stopwatch, layer, MAIN, rows)
            yield from _rows(bench, bench.with_adapters(distinct), grid.repeats, copy, distinct)
    yield from _served(setting, grid)


class _Bench:
    """One form at one layer and size of step; matrices enough that none is met in the cache."""

    def __init__(self, setting: Setting, stopwatch: Stopwatch, layer: PackedLayer, name: str, rows: int) -> None:
        self.setting, self.layer, self.name = setting, layer, name
        device, dtype = setting.device, setting.dtype
        torch.manual_seed(0)
        first = [random_matrix(name, size, layer.in_features, device) for size in layer.part_sizes]
        self.x = torch.randn(rows, layer.in_features, device=device, dtype=dtype)
        moved = self.x.nbytes + rows * layer.out_features * dtype.itemsize
        self.num_bytes = sum(part.nbytes for part in first) + moved
        self._sets = num_sets(stopwatch, self.num_bytes)
        self._parts = [first, *([in_other_memory(part) for part in first] for _ in range(self._sets - 1))]
        self.stopwatch = stopwatch
        self._quant = choose_quant("triton", device)

    def products(self, *, dense: bool) -> list[Way]:
        """Ours, and where it is asked for torch's with the weights decoded before."""
        weights = self._weights(self._parts[0])
        expected = self.x.double() @ weights.double().T
        matrices = [self._quant.matrix(parts, self.setting.dtype) for parts in self._parts]
        ways = [self._way("triton", [partial(matrix.multiply, self.x, None) for matrix in matrices], expected)]
        if dense:
            copies = [weights, *(weights.clone() for _ in range(self._sets - 1))]
            ways.append(self._way("dense, torch", [partial(F.linear, self.x, one) for one in copies], expected))
        return ways

    def with_adapters(self, distinct: int) -> list[Way]:
        """A launch each for the layer and its adapters, and one for both."""
        layer, dtype, device = self.layer, self.setting.dtype, self.setting.device
        lora = choose_lora("triton-fused", device)
        table = lora.new_table(layer.in_features, layer.part_sizes, dtype=dtype, device=device, max_bytes=1 << 34)
        generator = torch.Generator().manual_seed(0)
        for slot in range(distinct):
            pairs = (random_factors(RANK, layer.in_features, size, generator) for size in layer.part_sizes)
            parts = tuple(PartDelta(Factors(a.to(dtype), b.to(dtype))) for a, b in pairs)
            table.write(slot, table.pack(SlotDelta(parts)))
        traffic = even_traffic(len(self.x), distinct)
        plan = lora.static_plan(len(self.x), len(self.x))
        assert plan is not None
        assert plan.set(traffic.plan)
        matrices = [self._quant.matrix(parts, dtype) for parts in self._parts]
        joins = [matrix.join(table) for matrix in matrices]

        def in_turn(index: int) -> torch.Tensor:
            y = matrices[index].multiply(self.x, None)
            table.add_(y, self.x, plan)
            return y

        def joined(index: int) -> torch.Tensor:
            join = joins[index]
            assert join is not None
            return join(self.x, self.x, None, plan)

        expected = in_turn(0).double()
        calls = range(self._sets)
        return [
            self._way("two launches", [partial(in_turn, index) for index in calls], expected),
            self._way("joined", [partial(joined, index) for index in calls], expected),
        ]

    def _weights(self, parts: Sequence[StoredMatrix]) -> torch.Tensor:
        return torch.cat([decode(part, self.setting.dtype) for part in parts])

    def _way(self, way: str, calls: Sequence[Callable[[], torch.Tensor]], expected: torch.Tensor) -> Way:
        excess = worst_excess(calls[0](), expected, self.setting.dtype)
        if excess > 1:
            where = f"{self.name}, {self.layer.name}, {len(self.x)} rows"
            raise WrongResult(f"{way}, {where}: {excess:.1f} times the tolerance away from the decoded weights")
        return Way(way, tuple(calls), capturable=True)


def _rows(
    bench: _Bench, ways: list[Way], repeats: int, copy: float | None, distinct: int | None = None
) -> Iterator[Row]:
    calls = 1 if bench.setting.dry else 10
    for timing in measure(ways, bench.stopwatch, repeats=repeats, calls=calls):
        limit_us = None if copy is None or timing.way.startswith("dense") else bench.num_bytes / copy * 1e6
        yield {
            "stored": bench.name,
            "layer": bench.layer.name,
            "rows": len(bench.x),
            "distinct": distinct,
            "way": timing.way,
            "us": timing.us,
            "replay_us": timing.replay_us,
            "limit_us": limit_us,
            "share_of_copy_speed": None if limit_us is None else limit_us / _best_us(timing),
        }


def _best_us(timing: Timing) -> float:
    return timing.us if timing.replay_us is None else timing.replay_us


def _served(setting: Setting, grid: Grid) -> Iterator[Row]:
    """Decode steps of the engine on a quantized model, without adapters and with, joined and not."""
    steps, rank = steps_for(setting), 4 if setting.dry else RANK
    with tempfile.TemporaryDirectory(prefix="loraplex-gpu-check-") as folder:
        shape = shape_of(setting.dry)  # of the dry one 96 inputs would be no whole blocks
        model_dir = write_config(replace(shape, intermediate_size=128) if setting.dry else shape, Path(folder))
        for backend in ("triton-fused",) if setting.dry else ("triton", "triton-fused"):
            most = max(batch for batch, _ in grid.served)
            engine = engine_for(
                setting,
                model_dir,
                backend,
                most,
                lambda model: DummyAdapters(model, {}).load,
                quantization=QUANTIZATION,
            )
            for number in range(max(distinct for _, distinct in grid.served)):
                engine.load_adapter(f"a{number}", f"{rank}/{number}")
            for batch, distinct in grid.served:
                if setting.left_s() < CELL_S and not setting.dry:
                    raise OutOfTime(f"before {backend}, batch {batch}, {distinct} adapters")
                names = tuple(f"a{row * distinct // batch}" for row in range(batch))
                base_s, adapters_s = (decode_s(engine, steps, asked) for asked in (("",) * batch, names))
                own = retained((batch, distinct), base_s, adapters_s)
                yield {"quantization": QUANTIZATION, "backend": backend, "rank": rank, **own}
            del engine
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()


SECTION = Section("quant", run, 60.0)
