"""A step's spans as int32 records, which kernels of a device read; knows no op and no kernel language.

All that changes from one step to the next is in device memory, so a captured launch serves any later step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from loraplex_kernels.attention.paged_plan import IntArray, host_array, joined
from loraplex_kernels.states import BLANK, StateSpan

# A record of a span (index of an int32).
FIRST_ROW: Final = 0
NUM_ROWS: Final = 1  # 0 for a padded row
SOURCE: Final = 2
SLOT: Final = 3
LIMITED: Final = 4
SAVES: Final = 5  # number of its first save
NUM_SAVES: Final = 6
RECORD: Final = 8
#: a save: after how many rows, and its slot
SAVE: Final = 2


@dataclass(frozen=True, slots=True)
class SpanRecords:
    """Spans on the device. ``table`` ``[S, RECORD]`` and ``saves`` ``[n, SAVE]`` are int32; the first ``num_single``
    spans have one row each (or are padding), all others have several."""

    table: torch.Tensor
    saves: torch.Tensor
    num_single: int
    num_tokens: int

    @property
    def num_spans(self) -> int:
        return len(self.table)


def upload(
    spans: Sequence[StateSpan], device: torch.device, lists: Sequence[IntArray]
) -> tuple[SpanRecords, list[torch.Tensor]]:
    """The records of ``spans``, and an op's own ``lists`` as int32 tensors, by one copy that nothing waits for.

    Raises ValueError when a span of one row comes behind one of several.
    """
    num_single = count_single(spans)
    saves = np.array([save for span in spans for save in span.saves], dtype=np.int32).reshape(-1, SAVE)
    sections = [_records(spans), saves, *lists]
    array, starts = joined(sections)
    on_device = host_array(array, device).to(device, non_blocking=True)
    table, saved, *own = (
        on_device[start : start + section.size].view(section.shape)
        for start, section in zip(starts, sections, strict=True)
    )
    return SpanRecords(table, saved, num_single, sum(span.num_rows for span in spans)), own


class StaticRecords:
    """Single rows in device memory that never moves, for a captured graph. Fresh, all of them are padding."""

    def __init__(self, max_sequences: int, device: torch.device) -> None:
        table = torch.empty((max_sequences, RECORD), dtype=torch.int32, device=device)
        self.records = SpanRecords(table, table.new_empty((0, SAVE)), max_sequences, max_sequences)
        self.set(())

    @property
    def num_tokens(self) -> int:
        return self.records.num_tokens

    def set(self, spans: Sequence[StateSpan]) -> bool:
        """Make these the spans of the next replay; False, and nothing changed, when they do not fit."""
        missing = self.num_tokens - len(spans)
        if missing < 0 or any(span.num_rows != 1 or span.saves for span in spans):
            return False
        padding = np.zeros((missing, RECORD), dtype=np.int32)
        padding[:, FIRST_ROW] = np.arange(len(spans), self.num_tokens)
        padding[:, SOURCE] = BLANK
        host = host_array(np.concatenate([_records(spans), padding]), self.records.table.device)
        self.records.table.copy_(host, non_blocking=True)
        return True


def count_single(spans: Sequence[StateSpan]) -> int:
    """How many spans have one row. Raises ValueError unless those come first."""
    single = [span.num_rows == 1 for span in spans]
    count = sum(single)
    if not all(single[:count]):
        raise ValueError(f"sequence {single.index(False)} of the step has several rows; those of one row come first")
    return count


def _records(spans: Sequence[StateSpan]) -> IntArray:
    records = np.zeros((len(spans), RECORD), dtype=np.int32)
    if spans:
        values = [(span.num_rows, span.source, span.slot, span.num_limited, len(span.saves)) for span in spans]
        rows, source, slot, limited, saves = np.array(values, dtype=np.int32).T
        records[:, FIRST_ROW], records[:, NUM_ROWS] = np.cumsum(rows) - rows, rows
        records[:, SOURCE], records[:, SLOT], records[:, LIMITED] = source, slot, limited
        records[:, SAVES], records[:, NUM_SAVES] = np.cumsum(saves) - saves, saves
    return records
