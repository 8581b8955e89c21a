"""The spans of a step as the compiled scan takes them: in pieces of few rows, which end where states are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from loraplex_kernels.states import StateSpan

#: rows of a piece at most: their B and C stay in the nearest cache while all of a thread's heads pass
PIECE_ROWS: Final = 16
#: int64 fields of a piece, in order. Its states come from ``source`` (below 0: zeros) and go to ``slot``, and to
#: ``also`` unless that is below 0; ``span`` is whose parameters hold
FIELDS: Final = ("first_row", "num_rows", "source", "slot", "also", "num_limited", "span")


@dataclass(frozen=True, slots=True)
class PiecePlan:
    """A step's pieces, ``[num_pieces, FIELDS]`` at ``address``. A span's pieces follow one another: each begins with
    the states that the one before it wrote."""

    table: np.ndarray
    address: int
    num_pieces: int
    num_tokens: int
    num_spans: int


def plan_pieces(spans: Sequence[StateSpan]) -> PiecePlan:
    """The spans, cut."""
    pieces: list[tuple[int, ...]] = []
    row = 0
    for index, span in enumerate(spans):
        source, start, saves = span.source, 0, dict(span.saves)
        stops = sorted({*saves, *range(PIECE_ROWS, span.num_rows, PIECE_ROWS), span.num_rows})
        for stop in stops:
            limited = min(max(span.num_limited - start, 0), stop - start)
            also = saves.get(stop, -1)
            pieces.append((row + start, stop - start, source, span.slot, also, limited, index))
            source, start = span.slot, stop
        row += span.num_rows
    table = np.array(pieces, dtype=np.int64).reshape(-1, len(FIELDS))
    return PiecePlan(table, table.ctypes.data, len(pieces), row, len(spans))
