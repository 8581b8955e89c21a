"""The check as JSON and as a short table."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.gpu_check.section import Outcome, Row, Setting
from bench.machine import versions
from bench.result_file import write_result

SCHEMA = 2
_COLOURS = {"ok": "green", "skipped": "yellow"}
PACKAGES = ("torch", "triton", "transformers", "peft", "msgspec", "numpy")


@dataclass
class Report:
    """Everything of one check. Owned by ``__main__``."""

    command: list[str]
    setting: Setting
    outcomes: list[Outcome] = field(default_factory=list)

    def passed(self, planned: int) -> bool:
        """Whether all that was planned was run, or skipped for what this machine lacks, and nothing failed."""
        return len(self.outcomes) == planned and all(outcome.status in _COLOURS for outcome in self.outcomes)

    def write(self, path: Path | None) -> None:
        """As JSON, made whole or not at all."""
        if path is None:
            return
        found = {
            "dry_run": self.setting.dry,
            "device": device_facts(self.setting.device),
            "versions": versions(PACKAGES),
            "sections": [asdict(outcome) for outcome in self.outcomes],
        }
        write_result(path, SCHEMA, self.command, found)


def device_facts(device: torch.device) -> dict[str, object]:
    """What was measured on."""
    if device.type != "cuda":
        return {"name": platform.machine(), "kind": "cpu, kernels in Triton's interpreter: times mean nothing"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "kind": "cuda",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "system": platform.platform(),
    }


def show_row(console: Console, row: Row) -> None:
    """One line, as it is measured."""
    text = "  ".join(f"{key} {_cell(value)}" for key, value in row.items() if value is not None)
    console.print("  " + escape(text), soft_wrap=True)


def show_summary(console: Console, report: Report, planned: Sequence[str]) -> None:
    """A line for each section, and at the end what failed first and what was skipped."""
    table = Table("section", "", "rows", "seconds", "why")
    done = {outcome.name: outcome for outcome in report.outcomes}
    for name in planned:
        outcome = done.get(name, Outcome(name, "not run"))
        colour = _COLOURS.get(outcome.status, "red")
        why = escape((outcome.error or outcome.reason).split("\n", 1)[0])
        table.add_row(name, f"[{colour}]{outcome.status}", str(len(outcome.rows)), f"{outcome.seconds:.1f}", why)
    console.print(table)
    _show_retention(console, done.get("retention"), ("backend", "rank", "distinct"))
    _show_retention(console, done.get("kinds"), ("kinds",))
    _show_retention(console, done.get("quant"), ("quantization", "backend", "distinct"))
    _show_retention(console, done.get("ranks"), ("ranks", "graphs", "distinct"))
    first = next((outcome for outcome in report.outcomes if outcome.status == "failed"), None)
    if first is not None:
        console.print(
            f"[red]failed first: {first.name}[/]\n{escape(first.error)}\n{escape(first.detail)}", soft_wrap=True
        )
    for outcome in report.outcomes:
        if outcome.status == "skipped":
            console.print(f"[yellow]skipped: {outcome.name}[/]: {escape(outcome.reason)}", soft_wrap=True)
    if report.setting.dry:
        console.print("a dry run: every section was gone through, nothing was measured")


def _show_retention(console: Console, outcome: Outcome | None, keys: tuple[str, ...]) -> None:
    """A base step's time over that with adapters, a line for each combination of ``keys``, a column for each batch."""
    rows = [row for row in (outcome.rows if outcome else ()) if "retention" in row]
    batches = sorted({int(row["batch"] or 0) for row in rows})
    if not rows:
        return
    table = Table(
        *keys, *(f"batch {batch}" for batch in batches), title=f"retention ({outcome.name if outcome else ''})"
    )
    found = {tuple(row[key] for key in (*keys, "batch")): row["retention"] for row in rows}
    for line in dict.fromkeys(cell[:-1] for cell in found):
        cells = (found.get((*line, batch)) for batch in batches)
        table.add_row(*map(str, line), *(f"{cell:.3f}" if isinstance(cell, float) else "" for cell in cells))
    console.print(table)


def _cell(value: str | int | float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
