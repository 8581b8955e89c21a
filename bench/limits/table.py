"""The grid as tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.limits.designs import DESIGNS, FUSED, GRID_MAX_RANK, LEAST, TWO_LAUNCHES, USUAL, USUAL_PADDED, Design
from bench.limits.grid import VARIANTS, Cell, Grid, variant_cells, variant_cost
from bench.limits.hardware import BASE_FORMATS, BF16, BaseFormat
from bench.limits.layouts import LAYOUTS, MIXES, wastes
from bench.limits.steps import StepCost, overhead


def show(grid: Grid, rows: int, console: Console) -> None:
    """The steps of ``rows`` rows, then what variants of our design and other layouts would change."""
    _assumptions(grid, console)
    console.print(_steps(grid, rows))
    console.print(_variants(grid))
    console.print(_layouts())


def _assumptions(grid: Grid, console: Console) -> None:
    hardware = grid.hardware
    bases = ", ".join(f"{base.name} {base.step_s(grid.model, hardware) * 1e3:.2f} ms" for base in BASE_FORMATS)
    console.print(
        f"{grid.model.name}, every linear layer adapted, {grid.model.num_tables} tables; {hardware.name} taken as "
        f"{hardware.dram_bytes_per_s / 1e12:.1f} TB/s, {hardware.l2_bytes_per_s / 1e12:.1f} TB/s second-level cache, "
        f"{hardware.node_s * 1e6:.0f} us a node. Base step: {bases}. All times computed, none measured."
    )


def _steps(grid: Grid, rows: int) -> Table:
    table = Table(title=f"a decode step of {rows} rows: GB of factors read, overhead in % of the base step")
    for heading in ("distinct", "rank", "true", f"to {GRID_MAX_RANK}"):
        table.add_column(heading, justify="right")
    for base in BASE_FORMATS:
        table.add_column(f"{base.name}: least, one launch, two, usual, padded", justify="right")
    for entry in grid.cells:
        if entry.cell.rows == rows:
            gigabytes = (entry.costs[design.name].dram_bytes / 1e9 for design in (TWO_LAUNCHES, USUAL_PADDED))
            overheads = (_overheads(grid, entry.cell, base) for base in BASE_FORMATS)
            table.add_row(
                str(entry.cell.distinct), entry.cell.rank_name, *(f"{value:.2f}" for value in gigabytes), *overheads
            )
    first = next(entry for entry in grid.cells if entry.cell.rows == rows)
    launches = ", ".join(f"{d.name} {first.costs[d.name].launches}" for d in (FUSED, TWO_LAUNCHES, USUAL))
    table.caption = f"launches in every cell: {launches}; a step of base rows alone has none"
    return table


def _overheads(grid: Grid, cell: Cell, base: BaseFormat) -> str:
    return " ".join(f"{100 * grid.overhead(cell, design, base):5.1f}" for design in DESIGNS)


def _variants(grid: Grid) -> Table:
    headings = (f"batch {cell.rows}, {cell.distinct} of r{cell.rank_name}" for cell in variant_cells())
    table = Table("two launches: GB in cache, overhead in % of a bf16 step", *headings, title="what the sums cost")
    references: tuple[tuple[str, Design], ...] = (("the usual design", USUAL), ("the least", LEAST))
    for name, design in (*VARIANTS, *references):
        costs = (variant_cost(grid, cell, design) for cell in variant_cells())
        table.add_row(name, *(_variant(grid, cost) for cost in costs))
    return table


def _variant(grid: Grid, cost: StepCost) -> str:
    return f"{cost.l2_bytes / 1e9:4.2f}  {100 * overhead(cost, BF16, grid.model, grid.hardware):5.1f} %"


def _layouts() -> Table:
    table = Table("ranks loaded", *(layout.name for layout in LAYOUTS), title="memory wasted (launches for one op)")
    found = {(waste.mix, waste.layout): waste for waste in wastes()}
    for mix in MIXES:
        row = (found[mix.name, layout.name] for layout in LAYOUTS)
        table.add_row(mix.name, *(f"{100 * waste.wasted:.0f} % ({waste.launches_per_op})" for waste in row))
    return table
