"""The segmented low-rank product in plain torch, three ways. Each is made for one plan, and ready to be captured.

All take one term a segment, of weight 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from loraplex_kernels.lora import Factors
from loraplex_kernels.segments import SegmentPlan

#: (y, x) -> y changed in place
Add = Callable[[torch.Tensor, torch.Tensor], None]
Slots = Sequence[Sequence[Factors]]


def segment_loop(plan: SegmentPlan, slots: Slots) -> Add:
    """Two products for each segment and part, on slices of rows."""

    def add(y: torch.Tensor, x: torch.Tensor) -> None:
        for segment in plan.segments:
            rows, first = slice(segment.start, segment.stop), 0
            for part in slots[segment.terms[0].slot]:
                y[rows, first : first + part.b.shape[0]].addmm_(x[rows] @ part.a.T, part.b.T)
                first += part.b.shape[0]

    return add


def adapter_loop(plan: SegmentPlan, slots: Slots) -> Add:
    """Each projection on its own, rows gathered by index and added back by index, as PEFT's mixed batch does."""
    linear = torch.nn.functional.linear
    device = slots[0][0].a.device
    rows_of: dict[int, list[int]] = {}
    for segment in plan.segments:
        rows_of.setdefault(segment.terms[0].slot, []).extend(range(segment.start, segment.stop))
    indices = {slot: torch.tensor(rows, device=device) for slot, rows in rows_of.items()}

    def add(y: torch.Tensor, x: torch.Tensor) -> None:
        for slot, rows in indices.items():
            first = 0
            for part in slots[slot]:
                columns = slice(first, first + part.b.shape[0])
                y[rows, columns] += linear(linear(x[rows], part.a), part.b)
                first = columns.stop

    return add


def gathered_bmm(plan: SegmentPlan, slots: Slots) -> Add:
    """Factors padded to the largest rank and gathered for every row, then two batched products.

    Rows without an adapter take a slot of zeros.
    """
    row_slots = [len(slots)] * plan.num_rows
    for segment in plan.segments:
        row_slots[segment.start : segment.stop] = [segment.terms[0].slot] * (segment.stop - segment.start)
    parts = [_padded([slot[index] for slot in slots]) for index in range(len(slots[0]))]
    index = torch.tensor(row_slots, device=parts[0].a.device)

    def add(y: torch.Tensor, x: torch.Tensor) -> None:
        first = 0
        for part in parts:
            hidden = torch.bmm(part.a[index], x[:, :, None])  # [T, R, 1]
            columns = slice(first, first + part.b.shape[1])
            y[:, columns] += torch.bmm(part.b[index], hidden)[:, :, 0]
            first = columns.stop

    return add


def _padded(factors: Sequence[Factors]) -> Factors:
    """All slots' factors and one slot of zeros: a is ``[slots + 1, R, in]``, b ``[slots + 1, out, R]``."""
    rank = max(part.a.shape[0] for part in factors)
    example = factors[0]
    a = example.a.new_zeros(len(factors) + 1, rank, example.a.shape[1])
    b = example.b.new_zeros(len(factors) + 1, example.b.shape[0], rank)
    for slot, part in enumerate(factors):
        a[slot, : part.a.shape[0]] = part.a
        b[slot, :, : part.b.shape[1]] = part.b
    return Factors(a, b)


FORMULATIONS: Mapping[str, Callable[[SegmentPlan, Slots], Add]] = MappingProxyType(
    {"segment loop": segment_loop, "adapter loop (PEFT)": adapter_loop, "gathered bmm": gathered_bmm}
)
