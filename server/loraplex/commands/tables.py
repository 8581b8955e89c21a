"""Tables on the terminal. Knows rich, not what is in a table."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.table import Table

#: columns, where nobody looks: a table is never wider than its content
_UNBOUNDED: Final = 10_000


def print_table(table: Table) -> None:
    """Print on standard output: folded to the width of a terminal; elsewhere (a file, a pipe) each row is one line, so
    that nothing is cut and ``grep`` finds it."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_UNBOUNDED)
    console.print(table)


def mebibytes(nbytes: int) -> str:
    """Bytes as MiB: to a tenth, and small ones to a hundredth."""
    size = nbytes / (1 << 20)
    return f"{size:,.1f}" if size >= 1 else f"{size:.2f}"
