"""A load's numbers on a terminal, 80 columns wide."""

from __future__ import annotations

from typing import Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.serve.document import Document
from bench.serve.measures import Latency, Summary

_MAX_NAME: Final = 16
_HEADINGS: Final = ("sent", "fail", "req/s", "out\ntok/s", "TTFT ms\np50 / p99", "TPOT ms\np50 / p99", "good\nput")


def show(document: Document, console: Console) -> None:
    """Print rates, latencies, goodput, errors, retention, and every warning."""
    if document.partial:
        console.print(
            f"[bold red]partial[/]: {document.requests_ended} of {document.requests_planned} requests: "
            f"{escape(document.stop_message or 'not every request was sent and answered')}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(_table(document))
    if document.retention is not None:
        kept = document.retention
        least_most = f"({kept.least:.3f} to {kept.most:.3f} in {len(kept.ratios)} repeats)"
        held = "" if document.workload.arrival.rate is None else "; in an open loop it says that the rate was held"
        console.print(f"retention {kept.median:.3f} {least_most}{held}", highlight=False)
    if document.comparison is not None:
        values = document.comparison.values
        wrong = sum(not value.ok for value in values)
        verdict = f"[yellow]{wrong} differ[/]" if wrong else "all agree"
        console.print(f"{len(values)} numbers compared with the server's own: {verdict}", highlight=False)
    for warning in document.warnings:
        console.print(f"[yellow]warning[/]: {escape(warning)}", highlight=False, soft_wrap=True)


def _table(document: Document) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", max_width=_MAX_NAME, overflow="ellipsis", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for side, result in document.sides.items():
        _row(table, side, result.all)
        if side == "adapters":
            for name, summary in result.adapters.items():
                _row(table, f"  {name}", summary)
    return table


def _row(table: Table, name: str, summary: Summary) -> None:
    goodput = summary.goodput
    table.add_row(
        escape(name),
        f"{summary.sent:,}",
        f"[red]{summary.failed:,}[/]" if summary.failed else "0",
        f"{summary.requests_per_s:.2f}",
        f"{summary.output_tokens_per_s:,.1f}",
        _ms(summary.ttft_s),
        _ms(summary.tpot_s),
        f"{goodput.share:.1%}" if goodput else "-",
    )


def _ms(latency: Latency | None) -> str:
    return "-" if latency is None else f"{1000 * latency.p50:,.0f} / {1000 * latency.p99:,.0f}"
