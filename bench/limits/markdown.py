"""The tables of docs/GPU.md as text, and the page with them in their places; a test holds the page to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.limits.designs import FUSED, GRID_MAX_RANK, LEAST, TWO_LAUNCHES, USUAL, USUAL_PADDED, Design
from bench.limits.grid import BATCHES, DISTINCT, MIXED_RANKS, RANKS, VARIANTS, Cell, Grid, variant_cells, variant_cost
from bench.limits.hardware import BF16
from bench.limits.layouts import LAYOUTS, MIXES, wastes
from bench.limits.steps import StepCost, overhead

COMPARED: tuple[Design, ...] = (LEAST, FUSED, TWO_LAUNCHES, USUAL, USUAL_PADDED)


def tables(grid: Grid) -> dict[str, str]:
    """Name -> Markdown table."""
    return {"bytes": _bytes(grid), "overheads": _overheads(grid), "sums": _sums(grid), "layouts": _layouts()}


def filled(page: str, grid: Grid) -> str:
    """``page`` with every table put between its marks. Raises ValueError for a mark that it lacks."""
    for name, table in tables(grid).items():
        start, end = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->\n"
        before, found, rest = page.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page has no {start.strip()} ... {end.strip()}")
        page = f"{before}{start}{table}{end}{after}"
    return page


def _bytes(grid: Grid) -> str:
    heads = ["distinct adapters", *(f"rank {r}" for r in RANKS), "ranks " + "/".join(map(str, MIXED_RANKS))]
    rows = [[str(distinct), *_gigabytes(grid, distinct, TWO_LAUNCHES)] for distinct in DISTINCT]
    padded = [[f"{n}, padded to {GRID_MAX_RANK}", *_gigabytes(grid, n, USUAL_PADDED)] for n in DISTINCT]
    return _table(heads, [*rows, *padded])


def _gigabytes(grid: Grid, distinct: int, design: Design) -> Iterable[str]:
    for ranks in (*((rank,) for rank in RANKS), MIXED_RANKS):
        if distinct < len(ranks):
            yield ""
        else:
            yield f"{grid.cost(Cell(max(BATCHES), distinct, ranks), design).dram_bytes / 1e9:.2f}"


def _overheads(grid: Grid) -> str:
    heads = ["batch", "distinct", *(f"rank {r}" for r in RANKS), "ranks " + "/".join(map(str, MIXED_RANKS))]
    rows = []
    for batch in BATCHES:
        for distinct in DISTINCT:
            if distinct <= batch:
                mixes = (*((rank,) for rank in RANKS), MIXED_RANKS)
                cells = (Cell(batch, distinct, ranks) if distinct >= len(ranks) else None for ranks in mixes)
                rows.append([str(batch), str(distinct), *(_percents(grid, cell) if cell else "" for cell in cells)])
    return _table(heads, rows)


def _percents(grid: Grid, cell: Cell) -> str:
    return " / ".join(_percent(grid.overhead(cell, design, BF16)) for design in COMPARED)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"


def _sums(grid: Grid) -> str:
    heads = ["", *(f"batch {c.rows}, {c.distinct} of rank {c.rank_name}" for c in variant_cells())]
    designs: tuple[tuple[str, Design], ...] = (*VARIANTS, ("the usual design", USUAL))
    rows = [
        [name, *(_variant(grid, variant_cost(grid, c, design)) for c in variant_cells())] for name, design in designs
    ]
    return _table(heads, rows)


def _variant(grid: Grid, cost: StepCost) -> str:
    return f"{cost.l2_bytes / 1e9:.2f} GB, {_percent(overhead(cost, BF16, grid.model, grid.hardware))} %"


def _layouts() -> str:
    found = {(waste.mix, waste.layout): waste for waste in wastes()}
    rows = []
    for mix in MIXES:
        entries = (found[mix.name, layout.name] for layout in LAYOUTS)
        rows.append([mix.name, *(f"{100 * entry.wasted:.0f} %, {entry.launches_per_op}" for entry in entries)])
    return _table(["ranks loaded", *(layout.name for layout in LAYOUTS)], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
