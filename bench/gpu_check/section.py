"""What a section of the check is given, and what it leaves behind.

A section yields rows as it measures them, so that what it found before it failed, or before time ran out, is kept.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

#: one measured line: plain values, so that it can be written as JSON and printed
Row = Mapping[str, str | int | float | None]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where the check runs. ``dry``: tiny sizes on a CPU, to go through the motions."""

    device: torch.device
    dry: bool
    deadline_s: float
    """On the monotonic clock."""

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU; the interpreter's bfloat16 dot is wrong, so float32 in a dry run."""
        return torch.float32 if self.dry else torch.bfloat16

    def left_s(self) -> float:
        """Seconds until the check must end."""
        return self.deadline_s - time.monotonic()


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the check. ``run`` may raise anything: the others go on."""

    name: str
    run: Callable[[Setting], Iterator[Row]]
    least_s: float
    """It is not begun with less time left than this."""
    lacks: Callable[[Setting], str] = lambda _: ""
    """What it needs and this machine does not have, in words; empty: nothing, so it runs."""


@dataclass(slots=True)
class Outcome:
    """What came of a section. ``error`` is the first thing that went wrong, ``reason`` why it was skipped."""

    name: str
    status: str = "ok"  # ok, failed, out of time, skipped
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    error: str = ""
    detail: str = ""
    reason: str = ""


class OutOfTime(Exception):
    """A section stopped early to leave the rest of the check its time; its rows so far are whole."""


def run_section(section: Section, setting: Setting, say: Callable[[Row], None]) -> Outcome:
    """Run one section to its end, its failure or the end of its time; or skip it, which is none of these."""
    outcome = Outcome(section.name)
    outcome.reason = section.lacks(setting)
    if outcome.reason:
        outcome.status = "skipped"
        return outcome
    if not setting.dry and setting.left_s() < section.least_s:
        outcome.status = "out of time"
        outcome.error = f"{setting.left_s():.0f} s were left, it needs at least {section.least_s:.0f}"
        return outcome
    start = time.monotonic()
    try:
        for row in section.run(setting):
            outcome.rows.append(row)
            say(row)
    except OutOfTime as error:
        outcome.status, outcome.error = "out of time", str(error)
    except Exception as error:
        outcome.status = "failed"
        outcome.error = f"{type(error).__name__}: {error}"
        outcome.detail = traceback.format_exc(limit=-8)
    outcome.seconds = time.monotonic() - start
    return outcome
