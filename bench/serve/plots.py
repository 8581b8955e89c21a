"""The pictures of a load, as PNG bytes, from its document alone. Colours: Okabe and Ito's, which all can tell apart."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bench.serve.document import Document, Run
from bench.serve.load import OK, UNFINISHED
from bench.serve.measures import DISTRIBUTION_POINTS, Latency, Summary
from bench.serve.workload import BASE

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY, INK = "#CC79A7", "#56B4E9", "#8A8F98", "#22262B"
SIDE_COLORS: Final = {"base": GREY, "adapters": BLUE}
SIDE_LABELS: Final = {"base": "base model alone", "adapters": "with adapters"}
#: the adapters with the most requests get these, in order; the rest share the last
ADAPTER_COLORS: Final = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION)
OTHER_COLOR: Final = "#B8BDC5"
#: of the pictures
NAMES: Final = ("throughput", "latency", "adapters", "requests")
MAX_BARS: Final = 24
_WIDTH_IN: Final = 10.0
_DPI: Final = 110
_MAX_NAME: Final = 22
_BAR: Final = 0.66
_PAPER: Final = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.2}
_WAITING: Final = "#C9CDD3"
_STYLE: Final[dict[Any, Any]] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#B8BDC5",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E8EB",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.wspace": 0.03,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """One picture."""

    name: str
    alt: str
    png: bytes


def draw(document: Document) -> list[Plot]:
    """Every picture that there are numbers for."""
    makers: tuple[tuple[str, Callable[[Document], Figure]], ...] = (
        ("Output tokens a second over time, run after run", _throughput),
        ("Cumulative distributions of TTFT, TPOT and ITL", _latency),
        ("Requests, output speed, TTFT, TPOT and goodput of every adapter", _adapters),
        ("Every request of one run from sending to end, and how many were in flight", _requests),
    )
    if not any(result.all.completed for result in document.sides.values()):
        return []
    # A context, so that no setting outlives the pictures.
    with mpl.rc_context(_STYLE):
        return [Plot(name, alt, _png(maker(document))) for name, (alt, maker) in zip(NAMES, makers, strict=True)]


def _png(figure: Figure) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=_DPI, metadata={"Software": None})
    return sink.getvalue()


def _throughput(document: Document) -> Figure:
    figure = Figure(figsize=(_WIDTH_IN, 3.6), layout="constrained")
    axes = figure.subplots()
    for run in document.runs:
        line = run.timeline
        edges = [
            run.started_s + min(index * line.bin_s, run.summary.duration_s) for index in range(len(line.tokens) + 1)
        ]
        kept = [(low, high, num) for low, high, num in zip(edges, edges[1:], line.tokens, strict=False) if high > low]
        if not kept:
            continue
        speeds = [num / (high - low) for low, high, num in kept]
        # A last bin that is cut short says little and looks wild.
        if len(kept) > 1 and kept[-1][1] - kept[-1][0] < line.bin_s / 2:
            kept, speeds = kept[:-1], speeds[:-1]
        color = SIDE_COLORS[run.side]
        axes.stairs(speeds, [low for low, _, _ in kept] + [kept[-1][1]], fill=True, color=color, alpha=0.25)
        axes.stairs(speeds, [low for low, _, _ in kept] + [kept[-1][1]], color=color, linewidth=0.8)
        mean, end = run.summary.output_tokens_per_s, run.started_s + run.summary.duration_s
        axes.hlines(mean, run.started_s, end, color=color, linewidth=2.2)
        axes.annotate(
            f"{mean:,.0f}",
            ((run.started_s + end) / 2, mean),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
            color=INK,
            bbox=_PAPER,
        )
    handles = [Line2D([], [], color=SIDE_COLORS[side], linewidth=4, label=SIDE_LABELS[side]) for side in document.sides]
    axes.set(title="Output speed, run after run (thick: mean of the run)", xlabel="time since the first run began (s)")
    axes.set_ylabel("output tokens / s")
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    axes.margins(x=0.01)
    axes.grid(axis="x", visible=False)
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return figure


def _latency(document: Document) -> Figure:
    figure = Figure(figsize=(_WIDTH_IN, 3.7), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    slo = document.slo
    limits = (slo.ttft_s if slo else None, slo.tpot_s if slo else None, None)
    titles = ("TTFT, each request", "TPOT, each request", "ITL, each gap between tokens")
    for axes, title, limit, name in zip(panels, titles, limits, ("ttft_s", "tpot_s", "itl_s"), strict=True):
        for side, result in document.sides.items():
            values = {
                "ttft_s": result.distribution.ttft_s,
                "tpot_s": result.distribution.tpot_s,
                "itl_s": result.distribution.itl_s,
            }[name]
            if values:
                milliseconds = [1000 * value for value in values]
                axes.plot(milliseconds, DISTRIBUTION_POINTS, color=SIDE_COLORS[side], linewidth=2.2)
        _limit(axes, limit)
        axes.set(title=title, xlabel="milliseconds", ylim=(0, 101))
        axes.set_xlim(left=0)
    panels[0].set_ylabel("share at most that long (%)")
    panels[0].set_yticks([0, 25, 50, 75, 90, 99], ["0", "25", "50", "75", "90", "99"])
    handles = [
        Line2D([], [], color=SIDE_COLORS[side], linewidth=2.5, label=SIDE_LABELS[side]) for side in document.sides
    ]
    if any(limits):
        handles.append(Line2D([], [], color=VERMILION, linestyle="--", label="SLO"))
    figure.legend(handles=handles, loc="outside upper right", ncols=3)
    return figure


def _adapters(document: Document) -> Figure:
    groups = _groups(document)
    has_goodput = document.slo is not None
    figure = Figure(figsize=(_WIDTH_IN, 1.5 + 0.36 * max(2, len(groups))), layout="constrained")
    panels = figure.subplots(1, 4 + has_goodput, sharey=True)
    colors = _colors(document)
    labels = [_short(name) for name, _ in groups]
    for axes in panels:
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    for row, (name, summary) in enumerate(groups):
        color = colors.get(name, OTHER_COLOR)
        panels[0].barh(row, summary.completed, color=color, height=_BAR)
        if others := summary.failed + summary.cut_off:
            panels[0].barh(row, others, left=summary.completed, color="white", edgecolor=INK, hatch="////", height=_BAR)
        panels[1].barh(row, summary.output_tokens_per_s, color=color, height=_BAR)
        _span(panels[2], row, summary.ttft_s, color)
        _span(panels[3], row, summary.tpot_s, color)
        if summary.goodput is not None:
            panels[4].barh(row, 100 * summary.goodput.share, color=color, height=_BAR)
            panels[4].text(4, row, f"{summary.goodput.share:.0%}", va="center", fontsize=9, bbox=_PAPER)
    panels[0].set_yticks(range(len(groups)), labels)
    panels[0].invert_yaxis()
    panels[0].set(title="Requests", xlabel="completed (hatched: not)")
    panels[1].set(title="Output speed", xlabel="tokens / s")
    panels[2].set(title="TTFT", xlabel="ms: p50, line to p99")
    panels[3].set(title="TPOT", xlabel="ms: p50, line to p99")
    for axes, limit in zip(panels[2:4], _slo_limits(document), strict=True):
        _limit(axes, limit)
        axes.set_xlim(left=0)
    if has_goodput:
        panels[4].set(title="Goodput", xlabel="% of requests sent", xlim=(0, 100))
    return figure


def _requests(document: Document) -> Figure:
    run = next((run for run in document.runs if run.side == "adapters"), document.runs[0])
    figure = Figure(figsize=(_WIDTH_IN, 5.6), layout="constrained")
    flight, lanes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3.2))
    times, counts = _in_flight(run)
    flight.step(times, counts, where="post", color=INK, linewidth=1.2)
    flight.fill_between(times, counts, step="post", color=INK, alpha=0.12)
    flight.set(title=f"Requests in flight, run {run.repeat} {SIDE_LABELS[run.side]}", ylabel="requests")
    flight.set_ylim(bottom=0)
    flight.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    lanes.yaxis.set_major_locator(MaxNLocator(integer=True))
    colors = _colors(document)
    width = max(0.6, min(5.0, 230 / max(1, len(run.requests))))
    lanes.add_collection(
        LineCollection(
            [((r.sent_s, r.index), (r.first_token_s or r.ended_s, r.index)) for r in run.requests],
            colors=_WAITING,
            linewidths=width,
        )
    )
    streams = [(r, r.first_token_s) for r in run.requests if r.first_token_s is not None]
    lanes.add_collection(
        LineCollection(
            [((first, r.index), (r.ended_s, r.index)) for r, first in streams],
            colors=[colors.get(r.adapter, OTHER_COLOR) for r, _ in streams],
            linewidths=width,
        )
    )
    bad = [r for r in run.requests if r.code not in (OK, UNFINISHED)]
    lanes.plot([r.ended_s for r in bad], [r.index for r in bad], "x", color=VERMILION, markersize=5)
    lanes.set(xlim=(0, run.summary.duration_s * 1.01), ylim=(run.planned - 0.4, -0.6))
    lanes.set(title="Each request: waits, then streams", xlabel="time since the run began (s)", ylabel="request")
    figure.legend(handles=list(_request_legend(document, run, bad=bool(bad))), loc="outside lower center", ncols=6)
    return figure


def _request_legend(document: Document, run: Run, *, bad: bool) -> Iterator[Line2D]:
    colors = _colors(document)
    names = {record.adapter for record in run.requests}
    yield Line2D([], [], color=_WAITING, linewidth=4, label="waits for first token")
    for name, color in colors.items():
        if name in names:
            yield Line2D([], [], color=color, linewidth=4, label=_short(name))
    if names - colors.keys():
        yield Line2D([], [], color=OTHER_COLOR, linewidth=4, label="other adapters")
    if bad:
        yield Line2D([], [], color=VERMILION, marker="x", linestyle="", label="failed")


def _groups(document: Document) -> list[tuple[str, Summary]]:
    """The base first, then the adapters with the most requests."""
    base = [(BASE, side.all) for name, side in document.sides.items() if name == "base"]
    adapters = document.sides["adapters"].adapters if "adapters" in document.sides else {}
    ranked = sorted(adapters.items(), key=lambda item: (-item[1].sent, item[0]))
    return [*base, *ranked][:MAX_BARS]


def _colors(document: Document) -> dict[str, str]:
    """The base is grey; adapters by how many requests they had."""
    names = [name for name, _ in _groups(document) if name != BASE]
    return {BASE: GREY} | dict(zip(names, ADAPTER_COLORS, strict=False))


def _slo_limits(document: Document) -> tuple[float | None, float | None]:
    return (document.slo.ttft_s, document.slo.tpot_s) if document.slo else (None, None)


def _limit(axes: Axes, limit_s: float | None) -> None:
    """A line at an SLO's limit, unless that is far beyond everything measured."""
    if limit_s is not None and 1000 * limit_s <= 1.5 * axes.get_xlim()[1]:
        axes.axvline(1000 * limit_s, color=VERMILION, linestyle="--", linewidth=1.4)


def _span(axes: Axes, row: int, latency: Latency | None, color: str) -> None:
    if latency is None:
        return
    axes.barh(row, 1000 * latency.p50, color=color, height=_BAR)
    axes.hlines(row, 1000 * latency.p50, 1000 * latency.p99, color=INK, linewidth=1.2)
    axes.plot(1000 * latency.p99, row, "|", color=INK, markersize=8)


def _in_flight(run: Run) -> tuple[list[float], list[int]]:
    """Counts after each change. In a closed loop the next is sent a moment after an end: that is drawn as no change."""
    moment = run.summary.duration_s / 1000
    changes: Counter[int] = Counter()
    for record in run.requests:
        changes[round(record.sent_s / moment)] += 1
        changes[round(record.ended_s / moment)] -= 1
    times = sorted(changes)
    return [time * moment for time in times], list(itertools.accumulate(changes[time] for time in times))


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME // 2]}…{name[-_MAX_NAME // 2 + 1 :]}"
