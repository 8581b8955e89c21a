"""The page: one HTML file with its pictures and styles inside. Its shape is in ``report.html.jinja``."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.serve.document import Document
from bench.serve.measures import Latency, Summary
from bench.serve.plots import SIDE_LABELS, Plot
from bench.serve.workload import Arrival, Popularity, Workload

TEMPLATE: Final = "report.html.jinja"
_POPULARITY: Final = {
    "identical": "every request names the first adapter",
    "distinct": "each request names the next adapter in turn",
    "uniform": "adapters are drawn, all equally likely",
    "skewed": "adapters are drawn, the i-th with a likelihood proportional to 1 / i^{alpha:g}",
}
_LATENCIES: Final = ("TTFT", "TPOT", "ITL", "E2E")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table of results: a measure, its value on each side, and adapters over base."""

    name: str
    values: tuple[str, ...]
    ratio: str = ""


def render(document: Document, plots: Sequence[Plot]) -> bytes:
    """The page, UTF-8."""
    # Everything is escaped; undefined names are errors, so that a page never has a silent hole.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    main = document.sides.get("adapters") or document.sides.get("base")
    page = environment.get_template(TEMPLATE).render(
        doc=document,
        main=main,
        side_names=[SIDE_LABELS[side] for side in document.sides],
        facts=_facts(document),
        rows=_rows(document) if main else [],
        groups=_groups(document),
        pictures={
            plot.name: (plot.alt, f"data:image/png;base64,{base64.b64encode(plot.png).decode()}") for plot in plots
        },
        ms=_ms,
        percent=_percent,
        shown=_shown,
        seconds=_seconds,
    )
    return page.encode()


def _facts(document: Document) -> list[tuple[str, str]]:
    """What was asked for, in words."""
    workload = document.workload
    return [
        ("adapters", f"{len(workload.adapters)}: {_popularity(workload.popularity)}" if workload.adapters else "none"),
        ("arrival", _arrival(workload.arrival)),
        ("prompt", f"{workload.prompt_tokens} random tokens"),
        ("output", f"{workload.output_tokens} tokens, greedy, end-of-text ignored"),
        ("requests", _requests(workload)),
        ("SLO", str(document.slo) if document.slo else "none"),
        ("seed", str(workload.seed)),
    ]


def _popularity(popularity: Popularity) -> str:
    return _POPULARITY[popularity.kind].format(alpha=popularity.alpha or 0)


def _arrival(arrival: Arrival) -> str:
    if arrival.rate is None:
        return f"closed loop, {arrival.concurrency} requests in flight"
    spread = "" if arrival.cv is None else f", gamma distributed gaps, coefficient of variation {arrival.cv:g}"
    return f"open loop, {arrival.rate:g} requests/s{spread or ', Poisson'}"


def _requests(workload: Workload) -> str:
    runs = workload.repeats * len(workload.sides)
    turns = ", the two sides taking turns" if len(workload.sides) == 2 else ""
    return f"{workload.num_requests} in each of {runs} runs{turns}; {workload.warmup} before to warm up, not measured"


def _rows(document: Document) -> list[Row]:
    sides = [result.all for result in document.sides.values()]
    rows = [
        Row("requests sent", tuple(f"{side.sent:,}" for side in sides)),
        Row("failed / cut off", tuple(f"{side.failed:,} / {side.cut_off:,}" for side in sides)),
        _rate("requests/s", [side.requests_per_s for side in sides], 2),
        _rate("output tok/s", [side.output_tokens_per_s for side in sides], 1),
        _rate("total tok/s", [side.total_tokens_per_s for side in sides], 1),
    ]
    for name in _LATENCIES:
        latencies = [_latency(side, name) for side in sides]
        for part in ("mean", "p50", "p90", "p99"):
            values = [None if latency is None else _part(latency, part) for latency in latencies]
            rows.append(Row(f"{name} {part}", tuple(_ms(value) for value in values), _ratio(values)))
    if document.slo is not None:
        goodputs = [side.goodput for side in sides]
        shares = tuple(f"{g.share:.1%} ({g.requests_per_s:.2f}/s)" if g else "" for g in goodputs)
        rows.append(Row("goodput", shares))
    return rows


def _groups(document: Document) -> list[tuple[str, str, Summary]]:
    """(name, what it is, numbers) of every adapter on the side with adapters, most requests first."""
    if "adapters" not in document.sides:
        return []
    facts = {adapter.name: adapter for adapter in document.adapters}
    groups = sorted(document.sides["adapters"].adapters.items(), key=lambda item: (-item[1].sent, item[0]))
    return [
        (name, f"{facts[name].kind}, rank {facts[name].max_rank}, {facts[name].bytes / 1e6:.1f} MB", summary)
        for name, summary in groups
    ]


def _rate(name: str, values: Sequence[float], digits: int) -> Row:
    return Row(name, tuple(f"{value:,.{digits}f}" for value in values), _ratio(values))


def _ratio(values: Sequence[float | None]) -> str:
    """Adapters over base: sides are in the order of their names."""
    if len(values) != 2 or values[0] is None or not values[1]:
        return ""
    return f"{values[0] / values[1]:.2f}"


def _latency(summary: Summary, name: str) -> Latency | None:
    return {"TTFT": summary.ttft_s, "TPOT": summary.tpot_s, "ITL": summary.itl_s, "E2E": summary.e2e_s}[name]


def _part(latency: Latency, part: str) -> float:
    return {"mean": latency.mean, "p50": latency.p50, "p90": latency.p90, "p99": latency.p99}[part]


def _ms(seconds: float | None) -> str:
    """Milliseconds, with a decimal below 100."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s"


def _shown(value: float, unit: str) -> str:
    """A compared number: latencies in milliseconds, counts whole."""
    return f"{value * 1000:,.2f} ms" if unit == "s" else f"{value:,.0f}"
