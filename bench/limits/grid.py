"""The grid of decode steps that is asked about, every design counted in every cell; and the whole as plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from bench.limits.batch import Batch, even_batch
from bench.limits.designs import DESIGNS, FEW_ROWS, MANY_ROWS, Design
from bench.limits.hardware import BASE_FORMATS, BaseFormat, Hardware
from bench.limits.layouts import wastes
from bench.limits.shapes import ModelShape
from bench.limits.steps import StepCost, overhead, step_cost

BATCHES = (1, 8, 32, 64, 128)
DISTINCT = (1, 4, 8, 32)
RANKS = (8, 16, 64)
MIXED_RANKS = (8, 16, 32, 64)

#: what could be built differently in our own design, and what it would change
VARIANTS: tuple[tuple[str, Design], ...] = (
    ("16 rows, 16 ranks, 512 columns: as built up to 32 rows", FEW_ROWS),
    ("32 rows, 32 ranks, 1,024 columns: as built above", MANY_ROWS),
    ("the latter with expand tiles of 512 columns", replace(MANY_ROWS, column_block=512)),
    ("the latter with 64 rows", replace(MANY_ROWS, row_block=64)),
    ("the latter, planes summed once by the last shrink tile", replace(MANY_ROWS, summed_once=True)),
    ("both of these", replace(MANY_ROWS, summed_once=True, row_block=64)),
)
VARIANT_CELLS = ((32, 32, 16), (32, 4, 16), (128, 8, 16), (128, 1, 64))


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid: how many rows, of how many distinct adapters, of which ranks (cycled)."""

    rows: int
    distinct: int
    ranks: tuple[int, ...]

    @property
    def rank_name(self) -> str:
        return "/".join(map(str, self.ranks))

    def batch(self) -> Batch:
        return even_batch(self.rows, [self.ranks[index % len(self.ranks)] for index in range(self.distinct)])


@dataclass(frozen=True, slots=True)
class CellCosts:
    """A cell and what each design pays in it."""

    cell: Cell
    costs: dict[str, StepCost]


@dataclass(frozen=True, slots=True)
class Grid:
    """Every cell counted for one model on one accelerator."""

    model: ModelShape
    hardware: Hardware
    cells: tuple[CellCosts, ...]

    def overhead(self, cell: Cell, design: Design, base: BaseFormat) -> float:
        """Adapter time over the base step's."""
        return overhead(self.cost(cell, design), base, self.model, self.hardware)

    def cost(self, cell: Cell, design: Design) -> StepCost:
        """Raises KeyError when the cell is not of the grid."""
        for entry in self.cells:
            if entry.cell == cell:
                return entry.costs[design.name]
        raise KeyError(f"no cell {cell} in the grid")


def cells() -> Iterator[Cell]:
    """The grid, uniform ranks first, then the mixed ones."""
    for rows in BATCHES:
        for distinct in DISTINCT:
            if distinct <= rows:
                yield from (Cell(rows, distinct, (rank,)) for rank in RANKS)
    for rows in BATCHES:
        for distinct in DISTINCT:
            if len(MIXED_RANKS) <= distinct <= rows:
                yield Cell(rows, distinct, MIXED_RANKS)


def count(model: ModelShape, hardware: Hardware, designs: Sequence[Design] = DESIGNS) -> Grid:
    """Count every cell."""
    return Grid(
        model,
        hardware,
        tuple(
            CellCosts(cell, {d.name: step_cost(d, model, cell.batch(), hardware) for d in designs}) for cell in cells()
        ),
    )


def as_json(grid: Grid) -> str:
    """The grid, the variants and the layouts as JSON text; the same text for the same model and hardware."""
    bases = {base.name: base.step_s(grid.model, grid.hardware) for base in BASE_FORMATS}
    document = {
        "what": "Counted bytes and launches of a decode step's adapter work; times are computed from the rates under "
        "'hardware', not measured.",
        "model": asdict(grid.model),
        "hardware": asdict(grid.hardware),
        "base_step_ms": {name: round(step_s * 1e3, 4) for name, step_s in bases.items()},
        "cells": [
            _cell_record(entry.cell) | {"designs": {n: _cost_record(c, bases) for n, c in entry.costs.items()}}
            for entry in grid.cells
        ],
        "variants": [
            _cell_record(cell) | {"designs": {n: _cost_record(variant_cost(grid, cell, d), bases) for n, d in VARIANTS}}
            for cell in variant_cells()
        ],
        "layouts": [asdict(waste) | {"wasted": round(waste.wasted, 4)} for waste in wastes()],
    }
    return json.dumps(document, indent=1) + "\n"


def digest(document: str) -> str:
    """What a plot carries to say which numbers it was drawn from."""
    return hashlib.sha256(document.encode()).hexdigest()


def variant_cells() -> tuple[Cell, ...]:
    """The cells in which the variants are compared."""
    return tuple(Cell(rows, distinct, (rank,)) for rows, distinct, rank in VARIANT_CELLS)


def variant_cost(grid: Grid, cell: Cell, design: Design) -> StepCost:
    """A variant's cost in one cell."""
    return step_cost(design, grid.model, cell.batch(), grid.hardware)


def _cell_record(cell: Cell) -> dict[str, object]:
    return {"batch": cell.rows, "distinct": cell.distinct, "ranks": list(cell.ranks)}


def _cost_record(cost: StepCost, bases: dict[str, float]) -> dict[str, object]:
    return {
        "launches": cost.launches,
        "dram_bytes": cost.dram_bytes,
        "l2_bytes": cost.l2_bytes,
        "launch_us": round(cost.launch_s * 1e6, 2),
        "bytes_us": round(cost.bytes_s * 1e6, 2),
        "overhead": {name: round(cost.total_s / step_s, 4) for name, step_s in bases.items()},
        "retention": {name: round(step_s / (step_s + cost.total_s), 4) for name, step_s in bases.items()},
    }
