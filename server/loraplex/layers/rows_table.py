"""Slot -> the rows of one site's matrix that the adapter there has of its own.

A step's segments whose slot has rows here get them; all other rows of the step are untouched, and a step without such
segments pays for one look at whether there are any. Nothing is multiplied by a mask, so that no value of one segment
reaches another's rows. The low-rank term, the scales and the shift of the same site come after, on top of these rows'
outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex.layers.norm_rows import WeightedRows, weighted
from loraplex.layers.rows import OwnedRows, PackedRows, Rows, RowsSite
from loraplex.layers.rows_memory import RowsMemory
from loraplex_kernels.lora import Packed, StepPlan
from loraplex_kernels.segments import SegmentPlan


@dataclass(slots=True)
class _Kept:
    """What the rows here mean for one plan; ``weights`` once a norm has asked for them."""

    plan: SegmentPlan
    owned: tuple[OwnedRows, ...]
    weights: tuple[WeightedRows, ...] | None = None


class RowsTable:
    """One adapter's own rows of one site, by slot. Owner: the layer."""

    def __init__(self, site: RowsSite, memory: RowsMemory) -> None:
        """``memory`` is shared by all tables of a model."""
        self.site = site
        #: layers only look whether there are any
        self.held: dict[int, PackedRows] = {}
        self._memory = memory
        self._kept: _Kept | None = None

    @property
    def memory(self) -> RowsMemory:
        return self._memory

    def pack(self, rows: Rows, key: str = "") -> PackedRows:
        """Check and lay out rows for this table. Touches nothing that it holds: one other thread may call it. ``key``:
        of content that nobody else has, so that it need not be compared.

        Raises ValueError in shapes and numbers: they do not fit, or are not finite in the table's dtype.
        """
        return self._memory.pack(rows, self.site, key)

    def write(self, slot: int, packed: Packed) -> None:
        """Put what ``pack`` made into ``slot``, replacing what was there.

        On a GPU in the order of launched work. Raises MemoryError when the device has no room; the slot then holds
        what it held.
        """
        assert isinstance(packed, PackedRows)
        held = self._memory.take(slot, packed)
        self.clear(slot)
        self.held[slot] = held
        if self.site.folded:
            self._memory.fold_in(slot)

    def clear(self, slot: int) -> None:
        """Forget ``slot``; a no-op when it holds nothing."""
        self._kept = None
        held = self.held.pop(slot, None)
        if held is not None:
            self._memory.drop(slot, held)
            if self.site.folded:
                self._memory.fold_out(slot)

    def of(self, plan: StepPlan) -> Sequence[OwnedRows]:
        """The step's segments that have rows here, in row order; neighbours of equal content are one."""
        return self._found(plan.segments).owned if self.held else ()

    def weights_of(self, plan: StepPlan) -> Sequence[WeightedRows]:
        """The same of a norm, with few rows' weights gathered."""
        if not self.held:
            return ()
        kept = self._found(plan.segments)
        if kept.weights is None:
            kept.weights = weighted(kept.owned, self._memory.device)
        return kept.weights

    def _found(self, plan: SegmentPlan) -> _Kept:
        if self._kept is None or self._kept.plan is not plan:
            self._kept = _Kept(plan, self._find(plan))
        return self._kept

    def _find(self, plan: SegmentPlan) -> tuple[OwnedRows, ...]:
        found: list[OwnedRows] = []
        for rows, slot in self._memory.owners(plan):
            held = self.held.get(slot)
            if held is None:
                continue
            last = found[-1] if found else None
            if last is not None and last.segment.stop == rows.start and last.rows is held:
                found[-1] = OwnedRows(slice(last.segment.start, rows.stop), held)
                continue
            assert last is None or last.segment.stop <= rows.start, "two adapters' own rows in one sum"
            found.append(OwnedRows(rows, held))
        return tuple(found)


def replaces_all(owned: Sequence[OwnedRows], num_rows: int) -> bool:
    """Whether these, of one site, leave nothing of the base's output in a step of ``num_rows`` rows."""
    return all(one.rows.is_whole for one in owned) and sum(one.num_rows for one in owned) == num_rows


def put_products_(y: torch.Tensor, x: torch.Tensor, owned: Sequence[OwnedRows]) -> None:
    """Replace outputs ``y`` ``[T, num_rows]`` of a linear site by those of the own rows that the base has, too."""
    for one in owned:
        one.rows.put_known_(y[one.segment], one.rows.multiply(x[one.segment]))
