"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class StageProgress:
    """Shows the stages of a start one after the other. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._task: TaskID | None = None
        columns = (TextColumn("{task.description:>24}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)

    def __enter__(self) -> StageProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:  # elsewhere it never started, and would end with an empty line
            self._bar.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` of ``stage`` are ready; the unit is the stage's own."""
        if stage != self._stage:
            self._stage = stage
            self._task = self._bar.add_task(stage, total=None)
            if not self._console.is_terminal:
                self._console.print(f"{stage} ...", highlight=False)
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total or None)
