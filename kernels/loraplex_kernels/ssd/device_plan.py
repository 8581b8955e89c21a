"""How the spans of several rows are cut into chunks for a scan on a device; knows no kernel language.

A chunk ends where its span ends, where states are saved, and after so many rows at the latest: states that are wanted
are then always the last of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from loraplex_kernels.attention.paged_plan import IntArray
from loraplex_kernels.state_records import SpanRecords, StaticRecords, count_single, upload
from loraplex_kernels.states import StateSpan

# A chunk (index of an int32).
CHUNK_SPAN: Final = 0
CHUNK_ROW: Final = 1  # of the step
CHUNK_ROWS: Final = 2
CHUNK_LIMITED: Final = 3  # how many of them
CHUNK_SAVE: Final = 4  # slot of the states after it; -1: none
CHUNK: Final = 5

# A run: the chunks of a span.
RUN_SPAN: Final = 0
RUN_CHUNK: Final = 1  # number of its first
RUN_CHUNKS: Final = 2
RUN: Final = 3

NO_SAVE: Final = -1


@dataclass(frozen=True, slots=True)
class SsdStep:
    """One step's spans; of those of several rows the chunks ``[n, CHUNK]``, and the runs ``[m, RUN]``, int32."""

    records: SpanRecords
    chunks: torch.Tensor
    runs: torch.Tensor
    num_tokens: int


class StaticSsdStep(StaticRecords):
    """A plan for captured graphs: single rows alone, so there are no chunks."""

    def __init__(self, max_sequences: int, device: torch.device) -> None:
        super().__init__(max_sequences, device)
        self.chunks = self.records.table.new_empty((0, CHUNK))
        self.runs = self.records.table.new_empty((0, RUN))


def prepare(spans: Sequence[StateSpan], device: torch.device, chunk_rows: int) -> SsdStep:
    """The spans of a step on the device, in chunks of at most ``chunk_rows`` rows."""
    chunks: list[tuple[int, ...]] = []
    runs = []
    row = first = count_single(spans)
    for index, span in enumerate(spans[first:], start=first):
        made = [
            (index, row + start, stop - start, min(max(span.num_limited - start, 0), stop - start), save)
            for start, stop, save in _pieces(span, chunk_rows)
        ]
        runs.append((index, len(chunks), len(made)))
        chunks += made
        row += span.num_rows
    lists = [_array(chunks, CHUNK), _array(runs, RUN)]
    records, (on_device, runs_on_device) = upload(spans, device, lists)
    return SsdStep(records, on_device, runs_on_device, records.num_tokens)


def _pieces(span: StateSpan, chunk_rows: int) -> Iterator[tuple[int, int, int]]:
    """(first row, row behind the last, slot to save to) of each chunk."""
    start, wanted = 0, dict(span.saves)
    for end in sorted({*wanted, span.num_rows}):
        while start < end:
            stop = min(start + chunk_rows, end)
            yield start, stop, wanted.get(stop, NO_SAVE)
            start = stop


def _array(rows: Sequence[tuple[int, ...]], width: int) -> IntArray:
    return np.array(rows, dtype=np.int32).reshape(-1, width)
