"""The grid as figures. Okabe and Ito's colours, told apart by colour-blind readers; lines differ in marks too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from bench.limits.designs import FUSED, GRID_MAX_RANK, LEAST, TWO_LAUNCHES, USUAL, USUAL_PADDED, Design
from bench.limits.grid import DISTINCT, MIXED_RANKS, RANKS, Cell, Grid
from bench.limits.hardware import BASE_FORMATS

#: the metadata field of a PNG that says which numbers it shows
DIGEST_FIELD = "Source"
ROWS = 32
SPLIT_RANK = 16
PADDING_DISTINCT = 8
#: width of a bar, in groups
BAR = 0.25


@dataclass(frozen=True, slots=True)
class Look:
    """How a design is drawn."""

    design: Design
    label: str
    color: str
    mark: str


LOOKS = (
    Look(USUAL_PADDED, f"usual, one r{GRID_MAX_RANK} adapter loaded", "#D55E00", "v"),
    Look(USUAL, "usual, all of one rank", "#E69F00", "^"),
    Look(TWO_LAUNCHES, "ours, two launches", "#0072B2", "o"),
    Look(FUSED, "ours, one launch", "#56B4E9", "s"),
    Look(LEAST, "least possible", "#333333", ""),
)


def draw(grid: Grid, digest: str, folder: Path) -> list[str]:
    """Write every figure as a PNG that carries ``digest``; returns their file names."""
    with matplotlib.rc_context(
        {
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "legend.frameon": False,
        }
    ):
        for name, figure in FIGURES.items():
            figure(grid).savefig(folder / name, dpi=160, metadata={DIGEST_FIELD: digest})
    return list(FIGURES)


def _overhead(grid: Grid) -> Figure:
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    panels = figure.subplots(len(BASE_FORMATS), len(RANKS), sharex=True, sharey="row", squeeze=False)
    for row, base in zip(panels, BASE_FORMATS, strict=True):
        for axes, rank in zip(row, RANKS, strict=True):
            for look in LOOKS:
                values = [100 * grid.overhead(Cell(ROWS, n, (rank,)), look.design, base) for n in DISTINCT]
                dashed = "--" if look.design is LEAST else "-"
                axes.plot(DISTINCT, values, dashed, color=look.color, marker=look.mark, label=look.label, markersize=5)
            _log_axes(axes)
            if base is BASE_FORMATS[0]:
                axes.set_title(f"rank {rank}")
            if base is BASE_FORMATS[-1]:
                axes.set_xlabel("distinct adapters in the batch")
        row[0].set_ylabel(f"% of a {base.name} base step")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(
        f"Computed adapter overhead of a decode step: {grid.model.name}, batch {ROWS}, every linear layer", fontsize=12
    )
    return figure


def _log_axes(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(DISTINCT)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _launches_and_bytes(grid: Grid) -> Figure:
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    looks = [look for look in LOOKS if look.design in (USUAL, TWO_LAUNCHES, FUSED)]
    cells = [Cell(ROWS, distinct, (SPLIT_RANK,)) for distinct in DISTINCT]
    handles: list[Artist] = []
    for offset, look in enumerate(looks):
        costs = [grid.cost(cell, look.design) for cell in cells]
        places = [index + (offset - 1) * (BAR + 0.03) for index in range(len(cells))]
        launch_ms = [cost.launch_s * 1e3 for cost in costs]
        bytes_ms = [cost.bytes_s * 1e3 for cost in costs]
        axes.bar(places, launch_ms, BAR, color=look.color, edgecolor=look.color)
        axes.bar(places, bytes_ms, BAR, bottom=launch_ms, color="white", edgecolor=look.color, hatch="////")
        handles.append(Patch(color=look.color, label=f"{look.label}: {costs[0].launches} nodes a step"))
    handles.append(Patch(facecolor="#777777", edgecolor="#777777", label="launches"))
    handles.append(Patch(facecolor="white", edgecolor="#777777", hatch="////", label="bytes"))
    for index, cell in enumerate(cells):
        least_ms = grid.cost(cell, LEAST).bytes_s * 1e3
        handle = axes.hlines(least_ms, index - 0.45, index + 0.45, color="#222222", linestyle="--", linewidth=1.6)
    handle.set_label("least possible")
    handles.append(handle)
    axes.set_xticks(range(len(cells)), [str(cell.distinct) for cell in cells])
    axes.set_xlabel(f"distinct adapters of rank {SPLIT_RANK} in the batch")
    axes.set_ylabel("computed ms a decode step")
    axes.grid(axis="x", visible=False)
    for base, place in zip(BASE_FORMATS, (1.0, 1.12), strict=True):
        _percent_axis(axes, place, base.step_s(grid.model, grid.hardware) * 1e3, f"% of a {base.name} base step")
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(f"Where launches end and bytes begin: {grid.model.name}, batch {ROWS}", fontsize=12)
    return figure


def _percent_axis(axes: Axes, place: float, step_ms: float, label: str) -> None:
    """A second scale on the right: milliseconds as a share of a base step."""
    scale = 100 / step_ms

    def percent(ms: ArrayLike) -> NDArray[np.float64]:
        return np.asarray(ms, dtype=np.float64) * scale

    def back(share: ArrayLike) -> NDArray[np.float64]:
        return np.asarray(share, dtype=np.float64) / scale

    second = axes.secondary_yaxis(place, functions=(percent, back))
    second.set_ylabel(label)


def _padding(grid: Grid) -> Figure:
    mixes = sorted([*((rank,) for rank in RANKS), MIXED_RANKS], key=lambda ranks: sum(ranks) / len(ranks))
    cells = [Cell(ROWS, PADDING_DISTINCT, ranks) for ranks in mixes]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for offset, (look, label) in enumerate(((LOOKS[2], "true ranks"), (LOOKS[0], f"padded to {GRID_MAX_RANK}"))):
        places = [index + (offset - 0.5) * 0.4 for index in range(len(cells))]
        gigabytes = [grid.cost(cell, look.design).dram_bytes / 1e9 for cell in cells]
        bars = axes.barh(places, gigabytes, 0.36, color=look.color, label=label)
        axes.bar_label(bars, [f"{value:.2f}" for value in gigabytes], padding=4)
    axes.set_yticks(range(len(cells)), [f"rank {cell.rank_name}" for cell in cells])
    axes.invert_yaxis()
    axes.set_xlabel("GB of factors read from memory in one decode step")
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(
        f"What padding reads: {grid.model.name}, {PADDING_DISTINCT} distinct adapters in the batch, "
        f"one of rank {GRID_MAX_RANK} loaded",
        fontsize=12,
    )
    return figure


FIGURES: Mapping[str, Callable[[Grid], Figure]] = MappingProxyType(
    {"overhead.png": _overhead, "launches-and-bytes.png": _launches_and_bytes, "padding.png": _padding}
)
