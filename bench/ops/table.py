"""A Report as a table on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.ops.report import Report, Row
from bench.ops.timing import Timing


def show(found: Report, console: Console) -> None:
    """Median microseconds of a call, and beside them what a copy of the same bytes would take."""
    where = f"{found.device_name}, threads: {found.threads}" if found.device == "cpu" else found.device_name
    table = Table(title=f"{found.op}, {found.shapes}, {found.dtype}, {where}: median us of a call")
    table.add_column("step")
    if any(row.layer for row in found.rows):
        table.add_column("layer")
    if found.copy_bytes_per_s is not None:
        table.add_column("limit", justify="right")
        copied = f"{found.copy_bytes_per_s / 1e12:.3g} TB/s"
        passed = "pass in place" if found.device == "cpu" else "copy"
        table.caption = (
            f"limit: the least bytes at the {copied} of this run's {passed}; called / replayed from a graph (share)"
        )
    for timing in found.rows[0].timings:
        table.add_column(timing.way, justify="right")
    for row in found.rows:
        labels = [row.step, *([row.layer] if row.layer else [])]
        limit_us = found.limit_us(row)
        limits = [] if limit_us is None else [f"{limit_us:.1f}"]
        table.add_row(*labels, *limits, *(_cell(found, row, timing) for timing in row.timings))
    console.print(table)


def _cell(found: Report, row: Row, timing: Timing) -> str:
    share = found.share(row, timing)
    replayed = "" if timing.replay_us is None else f" / {timing.replay_us:.1f}"
    return f"{timing.us:.0f}{replayed}" + ("" if share is None else f" ({share:.0%})")
