"""A Record as tables on a terminal."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.table import Table

from bench.engine.record import Case, Goal, Measure, Record, interval


def show(record: Record, cases: tuple[Case, ...], goals: tuple[Goal, ...], console: Console) -> None:
    """Medians of tokens/s, then ratios and measures with their goals; in brackets is where a ratio's median lies at
    95 %."""
    speeds = Table("tokens/s, median (least - most)", *sorted({f"batch {case.batch:2d}" for case in cases}))
    sides = dict.fromkeys((case.side, case.mix) for case in cases)
    batches = sorted({case.batch for case in cases})
    for side, mix in sides:
        cells = [_speed(record, Case(side, batch, mix)) for batch in batches]
        speeds.add_row(f"{side}, {mix}", *cells)
    if speeds.row_count:
        console.print(speeds)

    judged = Table("goal", "measured", "limit", "")
    for goal in goals:
        ratios = record.ratios(goal)
        if ratios:
            median, (low, high) = statistics.median(ratios), interval(ratios)
            measured = f"{median:.3f} ({low:.3f} - {high:.3f})"
            judged.add_row(goal.name, measured, f">= {goal.least:.2f}", _verdict(median >= goal.least))
    for measure in record.measures:
        judged.add_row(*_measure_cells(measure))
    if judged.row_count:
        console.print(judged)


def _speed(record: Record, case: Case) -> str:
    speeds = [sample.tokens_per_s for sample in record.samples if sample.case == case]
    return f"{statistics.median(speeds):.0f} ({min(speeds):.0f} - {max(speeds):.0f})" if speeds else ""


def _measure_cells(measure: Measure) -> tuple[str, str, str, str]:
    name = f"{measure.name} ({measure.detail})" if measure.detail else measure.name
    if measure.most is None:
        return name, f"{measure.value:.2f} {measure.unit}", "", ""
    return (
        name,
        f"{measure.value:.2f} {measure.unit}",
        f"<= {measure.most:.2f}",
        _verdict(measure.value <= measure.most),
    )


def _verdict(met: bool) -> str:
    return "[green]met" if met else "[red]missed"
