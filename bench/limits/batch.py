"""A decode step's rows by adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """How many rows of the step use one adapter, and its rank."""

    rank: int
    rows: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One decode step: one row for each sequence."""

    adapters: tuple[AdapterRows, ...]
    base_rows: int = 0
    """Rows of no adapter."""

    @property
    def rows(self) -> int:
        return self.base_rows + sum(adapter.rows for adapter in self.adapters)

    @property
    def max_rank(self) -> int:
        return max((adapter.rank for adapter in self.adapters), default=0)


def even_batch(rows: int, ranks: Sequence[int]) -> Batch:
    """``rows`` spread evenly over one adapter for each of ``ranks``. Raises ValueError when some would get none."""
    distinct = len(ranks)
    if not 1 <= distinct <= rows:
        raise ValueError(f"{distinct} distinct adapters in {rows} rows, must be between 1 and the rows")
    return Batch(
        tuple(AdapterRows(rank, rows // distinct + (index < rows % distinct)) for index, rank in enumerate(ranks))
    )
