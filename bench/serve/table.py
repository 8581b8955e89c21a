"""A load's numbers on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.serve.document import Document
from bench.serve.measures import Latency, Summary


def show(document: Document, console: Console) -> None:
    """Print rates, latencies, goodput, errors, retention, and every warning."""
    if document.partial:
        console.print(
            f"[bold red]partial[/]: {document.requests_ended} of {document.requests_planned} requests "
            f"({escape(document.stop_message)})",
            highlight=False,
        )
    table = Table(title=f"{document.workload.arrival}, {document.workload.popularity}", title_justify="left")
    table.add_column("")
    for heading in (
        "sent",
        "failed",
        "req/s",
        "output tok/s",
        "TTFT p50 / p99",
        "TPOT p50 / p99",
        "ITL p99",
        "goodput",
    ):
        table.add_column(heading, justify="right")
    for side, result in document.sides.items():
        _row(table, side if len(document.sides) > 1 or side == "base" else "all", result.all)
        if len(result.adapters) > 1:
            for name, summary in result.adapters.items():
                _row(table, f"  {name}", summary)
    console.print(table)
    if document.retention is not None:
        kept = document.retention
        console.print(
            f"retention {kept.median:.3f} ({kept.least:.3f} - {kept.most:.3f}, {len(kept.ratios)} repeats)",
            highlight=False,
        )
    if document.comparison is not None:
        wrong = sum(not value.ok for value in document.comparison.values)
        verdict = f"{wrong} differ" if wrong else "all agree"
        console.print(
            f"{len(document.comparison.values)} numbers compared with the server's own: {verdict}", highlight=False
        )
    for warning in document.warnings:
        console.print(f"[yellow]warning[/]: {escape(warning)}", highlight=False, soft_wrap=True)


def _row(table: Table, name: str, summary: Summary) -> None:
    goodput = summary.goodput
    table.add_row(
        escape(name),
        f"{summary.sent:,}",
        f"{summary.failed:,}" if not summary.failed else f"[red]{summary.failed:,}[/]",
        f"{summary.requests_per_s:.2f}",
        f"{summary.output_tokens_per_s:.1f}",
        f"{_ms(summary.ttft_s, 'p50')} / {_ms(summary.ttft_s, 'p99')}",
        f"{_ms(summary.tpot_s, 'p50')} / {_ms(summary.tpot_s, 'p99')}",
        _ms(summary.itl_s, "p99"),
        f"{goodput.share:.1%}" if goodput else "",
    )


def _ms(latency: Latency | None, name: str) -> str:
    if latency is None:
        return "-"
    return f"{1000 * {'p50': latency.p50, 'p99': latency.p99}[name]:.0f} ms"
