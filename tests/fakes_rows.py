"""Tables of own rows for layers that a test puts together by itself."""

from __future__ import annotations

import torch

from loraplex.layers.rows import RowsForm, RowsSite
from loraplex.layers.rows_memory import RowsMemory
from loraplex.layers.rows_table import RowsTable
from loraplex_kernels.lora.slots import SlotBook

CPU = torch.device("cpu")


def linear_rows(num_rows: int, width: int, book: SlotBook | None = None) -> RowsTable:
    """An empty table of a linear site without bias, in float32."""
    site = RowsSite(RowsForm.MULTIPLIED, num_rows, width, torch.float32)
    return RowsTable(site, RowsMemory(book or SlotBook(), CPU))
