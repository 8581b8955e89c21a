"""Rows of a layer's matrix that one adapter has of its own: saved modules, trained tokens, added vocabulary, norms.

Per site one table, slot -> rows. A step's segments whose slot has rows here get them; all other rows of the step are
untouched and cost nothing. Nothing is multiplied by a mask, so that no value of one segment reaches another's rows.
The low-rank term, the scales and the shift of the same site come after, on top of these rows' outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex.quant.base import Weight
from loraplex.quant.dense import dense_weight
from loraplex_kernels.lora import Packed, StepPlan
from loraplex_kernels.lora.slots import SlotBook


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a site's matrix that are the adapter's own, in the base's dtype, on the host.

    ``values``: ``[k, in]`` of a linear site, ``[k, hidden]`` of an embedding (one row a token), ``[n]`` of a norm.
    ``indices``: ``[k]`` int64, rising, of the rows they stand for, which may lie past the base's last one (added
    vocabulary); None: all rows. ``bias``: ``[k]``, the whole bias of those rows; None where the site has none.
    """

    values: torch.Tensor
    indices: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for tensor in (self.values, self.indices, self.bias) if tensor is not None)


class PackedRows:
    """Rows as a layer multiplies by them, on the table's device once written. ``key``: equal content has equal keys."""

    __slots__ = ("bias", "indices", "key", "nbytes", "values", "weight")

    def __init__(self, rows: Rows, key: str, *, multiplied: bool) -> None:
        """``multiplied``: of a linear site, whose rows are kept in the form that multiplies fastest."""
        self.key = key
        self.indices = rows.indices
        self.bias = rows.bias
        self.values: torch.Tensor | None = None if multiplied else rows.values
        self.weight: Weight | None = dense_weight(rows.values) if multiplied else None
        stored = self.weight.nbytes if self.weight is not None else rows.values.nbytes
        self.nbytes = stored + sum(t.nbytes for t in (rows.indices, rows.bias) if t is not None)


@dataclass(frozen=True, slots=True)
class OwnedRows:
    """A segment of a step whose adapter has rows of its own at a site."""

    segment: slice
    rows: PackedRows


class RowsTable:
    """Slot -> one adapter's own rows of one site. Owner: the layer."""

    def __init__(self, book: SlotBook) -> None:
        """``book``: the low-rank backend's, where a slot counts as held that holds rows alone."""
        self._book = book
        self._slots: dict[int, PackedRows] = {}
        self._kept: tuple[StepPlan, tuple[OwnedRows, ...]] | None = None

    def write(self, slot: int, packed: Packed) -> None:
        """Put a PackedRows into ``slot``, replacing what was there."""
        assert isinstance(packed, PackedRows)
        self.clear(slot)
        self._slots[slot] = packed
        self._book.filled(slot)

    def clear(self, slot: int) -> None:
        """Forget ``slot``; a no-op when it holds nothing."""
        self._kept = None
        if self._slots.pop(slot, None) is not None:
            self._book.emptied(slot)

    def of(self, plan: StepPlan) -> Sequence[OwnedRows]:
        """The step's segments that have rows here, in row order."""
        if not self._slots:
            return ()
        if self._kept is None or self._kept[0] is not plan:
            found = tuple(
                OwnedRows(slice(segment.start, segment.stop), self._slots[term.slot])
                for segment in plan.segments.segments
                for term in segment.terms
                if term.slot in self._slots
            )
            self._kept = (plan, found)
        return self._kept[1]
