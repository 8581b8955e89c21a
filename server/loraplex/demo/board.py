"""The demo's streams on a terminal: panels side by side, redrawn as text arrives. Plain lines where there is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_PANEL_WIDTH: Final = 38


@dataclass
class Lane:
    """One stream. Owned by the task that reads it."""

    name: str
    adapter: str  # "" is the base
    text: str = ""
    num_tokens: int = 0
    ttft_s: float = 0.0
    done: bool = False


@dataclass(frozen=True)
class Board:
    """All streams of one prompt."""

    prompt: str
    lanes: list[Lane] = field(default_factory=list)

    def render(self, console: Console) -> Table:
        """Panels in as many columns as the terminal is wide enough for."""
        per_row = max(1, min(len(self.lanes), console.width // _PANEL_WIDTH))
        grid = Table.grid(expand=True)
        for _ in range(per_row):
            grid.add_column(ratio=1)
        panels = [_panel(lane) for lane in self.lanes]
        for start in range(0, len(panels), per_row):
            grid.add_row(*panels[start : start + per_row])
        return grid

    def plain(self, lane: Lane) -> str:
        """One finished stream as a line."""
        return f"[{lane.name}] {' '.join(lane.text.split())} ({lane.num_tokens} tokens)"


def _panel(lane: Lane) -> Panel:
    status = f"{lane.num_tokens} tokens" if lane.done else f"{lane.num_tokens} ..."
    style = "white" if lane.adapter == "" else "cyan"
    return Panel(Text(lane.text.strip()), title=lane.name, subtitle=status, border_style=style, title_align="left")
