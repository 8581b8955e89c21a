"""How far a load is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench.serve.load import OK, UNFINISHED, Outcome

_LINE_S: Final = 10.0


class LoadProgress:
    """Shows the runs one after the other. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        tail = (TextColumn("{task.fields[tokens]:,} tokens"), TextColumn("[red]{task.fields[failed]}[/]"))
        self._bar = Progress(*columns, *tail, console=console)
        self._task: TaskID | None = None
        self._name = ""
        self._planned = self._ended = self._failed = self._tokens = 0
        self._line_at = 0.0

    def __enter__(self) -> LoadProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, name: str, planned: int) -> None:
        """A run begins."""
        self._name, self._planned = name, planned
        self._ended = self._failed = self._tokens = 0
        self._line_at = time.monotonic() + _LINE_S
        if self._console.is_terminal:
            self._task = self._bar.add_task(name, total=planned, tokens=0, failed="")
        else:
            self._say(f"{name}: {planned} requests ...")

    def ended(self, outcome: Outcome) -> None:
        """One of its requests has ended."""
        self._ended += outcome.code != UNFINISHED
        self._failed += outcome.code not in (OK, UNFINISHED)
        self._tokens += outcome.num_tokens
        failed = f"{self._failed} failed" if self._failed else ""
        if self._task is not None:
            self._bar.update(self._task, completed=self._ended, tokens=self._tokens, failed=failed)
        elif time.monotonic() >= self._line_at:
            self._line_at = time.monotonic() + _LINE_S
            self._say(f"{self._name}: {self._ended}/{self._planned} {failed}".rstrip())

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
