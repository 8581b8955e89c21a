"""The page: one HTML file with its pictures and styles inside. Its shape is in ``report.html.jinja``."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.serve.compare import ComparedValue
from bench.serve.document import Document
from bench.serve.measures import Latency, Summary
from bench.serve.plots import SIDE_LABELS, Plot
from bench.serve.workload import Arrival, Lengths, Popularity, Slo, Workload

TEMPLATE: Final = "report.html.jinja"
_POPULARITY: Final = {
    "identical": "every request names the first adapter",
    "distinct": "each request names the next adapter in turn",
    "uniform": "adapters are drawn, all equally likely",
    "skewed": "adapters are drawn, the i-th with a likelihood proportional to 1 / i^{alpha:g}",
}
_LATENCIES: Final = ("TTFT", "TPOT", "ITL", "E2E")
_PARTS: Final = ("mean", "p50", "p90", "p99", "max")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table of results: a measure, whose it is ("" for all), its values."""

    name: str
    side: str
    values: tuple[str, ...]


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
        rates=_rates(document),
        latencies=_latencies(document),
        parts=_PARTS,
        groups=_groups(document),
        compared=_compared(document),
        pictures={
            plot.name: (plot.alt, f"data:image/png;base64,{base64.b64encode(plot.png).decode()}") for plot in plots
        },
        ms=_ms,
        slo=_slo(document.slo),
        shown=_shown,
    )
    return page.encode()


def _facts(document: Document) -> list[tuple[str, str]]:
    """What was asked for, in words."""
    workload = document.workload
    return [
        ("adapters", f"{len(workload.adapters)}: {_popularity(workload.popularity)}" if workload.adapters else "none"),
        ("arrival", _arrival(workload.arrival)),
        ("prompt", f"{_tokens(workload.prompt_tokens)}, random"),
        ("output", f"{_tokens(workload.output_tokens)}, greedy, end-of-text ignored"),
        ("requests", _requests(workload)),
        ("SLO", _slo(document.slo)),
        ("seed", str(workload.seed)),
    ]


def _popularity(popularity: Popularity) -> str:
    return _POPULARITY[popularity.kind].format(alpha=popularity.alpha or 0)


def _arrival(arrival: Arrival) -> str:
    if arrival.rate is None:
        return f"closed loop, always {arrival.concurrency} in flight"
    spread = "" if arrival.cv is None else f", gamma distributed gaps, coefficient of variation {arrival.cv:g}"
    return f"open loop, {arrival.rate:g} requests/s{spread or ', Poisson'}"


def _requests(workload: Workload) -> str:
    runs = workload.repeats * len(workload.sides)
    each = "in one run" if runs == 1 else f"in each of {runs} runs"
    turns = ", the two sides taking turns" if len(workload.sides) == 2 else ""
    return f"{workload.num_requests} {each}{turns}; {workload.warmup} before to warm up, not measured"


def _tokens(lengths: Lengths) -> str:
    return f"{lengths} token{'' if lengths.high == 1 else 's'}"


def _rates(document: Document) -> list[Row]:
    """Counts and rates, a column for each side, then adapters over base."""
    sides = [result.all for result in document.sides.values()]
    rows = [
        Row("requests sent", "", tuple(f"{side.sent:,}" for side in sides)),
        Row("completed", "", tuple(f"{side.completed:,}" for side in sides)),
        Row("failed / cut off", "", tuple(f"{side.failed:,} / {side.cut_off:,}" for side in sides)),
        _rate("requests/s", [side.requests_per_s for side in sides], 2),
        _rate("output tok/s", [side.output_tokens_per_s for side in sides], 1),
        _rate("total tok/s", [side.total_tokens_per_s for side in sides], 1),
    ]
    goodputs = [side.goodput for side in sides if side.goodput is not None]
    if goodputs:
        shares = tuple(f"{goodput.share:.1%}" for goodput in goodputs)
        rows.append(Row(f"goodput ({_slo(document.slo)})", "", shares))
        rows.append(_rate("good requests/s", [goodput.requests_per_s for goodput in goodputs], 2))
    return rows


def _latencies(document: Document) -> list[Row]:
    """A line for each latency and side, and one for adapters over base; the columns are ``_PARTS``."""
    rows = []
    for name in _LATENCIES:
        found = {side: _latency(result.all, name) for side, result in document.sides.items()}
        parts = {side: _parts(latency) for side, latency in found.items() if latency is not None}
        for side, values in parts.items():
            rows.append(Row(name, SIDE_LABELS[side], tuple(_ms(value) for value in values)))
        if len(parts) == 2:
            ratios = [_ratio(pair) for pair in zip(*parts.values(), strict=True)]
            rows.append(Row(name, "adapters / base", tuple(ratios)))
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


def _compared(document: Document) -> dict[str, list[ComparedValue]]:
    """The compared numbers by adapter, in the order of the measures."""
    by_adapter: dict[str, list[ComparedValue]] = {}
    for value in document.comparison.values if document.comparison else ():
        by_adapter.setdefault(value.adapter, []).append(value)
    return by_adapter


def _rate(name: str, values: Sequence[float], digits: int) -> Row:
    shown = [f"{value:,.{digits}f}" for value in values]
    return Row(name, "", (*shown, *([_ratio(values)] if len(values) == 2 else [])))


def _ratio(values: Sequence[float]) -> str:
    """Adapters over base, which is the order of their names; empty without both."""
    return f"{values[0] / values[1]:.2f}" if len(values) == 2 and values[1] else ""


def _latency(summary: Summary, name: str) -> Latency | None:
    return {"TTFT": summary.ttft_s, "TPOT": summary.tpot_s, "ITL": summary.itl_s, "E2E": summary.e2e_s}[name]


def _parts(latency: Latency) -> tuple[float, ...]:
    return (latency.mean, latency.p50, latency.p90, latency.p99, latency.max)


def _slo(slo: Slo | None) -> str:
    if slo is None:
        return "none"
    named = (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s), ("E2E", slo.e2e_s))
    return ", ".join(f"{name} \N{LESS-THAN OR EQUAL TO} {_ms(limit)}" for name, limit in named if limit is not None)


def _ms(seconds: float | None) -> str:
    """Milliseconds, with a decimal below 100."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"


def _shown(value: float, unit: str) -> str:
    """A compared number: latencies in milliseconds, counts whole."""
    return f"{value * 1000:,.2f} ms" if unit == "s" else f"{value:,.0f}"
