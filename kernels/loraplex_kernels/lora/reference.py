"""The segmented low-rank product, written to be checked by eye: one loop over segments, terms and parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from loraplex_kernels.lora import Factors, Fence, LoraTable, Packed, SlotDelta, StaticStepPlan, StepPlan
from loraplex_kernels.lora.factors import check_rows, fit_delta, tensors_of
from loraplex_kernels.lora.fence import AlwaysDone
from loraplex_kernels.lora.slots import SlotBook
from loraplex_kernels.segments import SegmentPlan


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """The segments as they are: this backend needs nothing else."""

    segments: SegmentPlan


@dataclass(frozen=True, slots=True)
class ReferencePacked:
    """A delta of the table's types, its tensors on the host and its own."""

    delta: SlotDelta

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors_of(self.delta))


class ReferenceTable:
    """Slot -> delta in a dict. Sums in float32, rounds once into y."""

    def __init__(
        self, in_features: int, part_sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, book: SlotBook
    ) -> None:
        self.in_features = in_features
        self.part_sizes = part_sizes
        self._dtype = dtype
        self._device = device
        self._book = book
        self._slots: dict[int, SlotDelta] = {}

    def pack(self, delta: SlotDelta) -> Packed:
        fitted = fit_delta(delta, in_features=self.in_features, part_sizes=self.part_sizes, dtype=self._dtype)
        return ReferencePacked(_mapped(fitted, torch.clone))

    def write(self, slot: int, packed: Packed) -> None:
        assert isinstance(packed, ReferencePacked)
        if slot < 0:
            raise ValueError(f"slot {slot} is negative")
        if slot not in self._slots:
            self._book.filled(slot)
        self._slots[slot] = _mapped(packed.delta, lambda tensor: tensor.to(self._device))

    def clear(self, slot: int) -> None:
        if self._slots.pop(slot, None) is not None:
            self._book.emptied(slot)

    def scale_input(self, x: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        scaled = x
        for segment in plan.segments.segments:
            held = [
                (term.weight, self._slots[term.slot].in_scale) for term in segment.terms if term.slot in self._slots
            ]
            changes = [weight * (in_scale - 1) for weight, in_scale in held if in_scale is not None]
            if changes:
                scaled = x.clone() if scaled is x else scaled
                rows = slice(segment.start, segment.stop)
                scaled[rows] = (x[rows].float() * (1 + sum(changes))).to(x.dtype)
        return scaled

    def add_(self, y: torch.Tensor, x: torch.Tensor, plan: StepPlan) -> None:
        self._add(y, x, plan.segments, lambda rows, a: rows.float() @ a.float().T)

    def add_lookup_(self, y: torch.Tensor, token_ids: torch.Tensor, plan: StepPlan) -> None:
        self._add(y, token_ids, plan.segments, lambda ids, a: a.float()[:, ids].T)

    def _add(
        self,
        y: torch.Tensor,
        inputs: torch.Tensor,
        plan: SegmentPlan,
        shrink: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        check_rows(y, inputs, plan.num_rows, self.part_sizes)
        for segment in plan.segments:
            rows = slice(segment.start, segment.stop)
            base = y[rows].float()  # [n, sum(part_sizes)]
            total = base.clone()
            for term in segment.terms:
                delta = self._slots.get(term.slot)
                column = 0
                for part, size in zip(delta.parts if delta else (), self.part_sizes, strict=False):
                    columns = slice(column, column + size)
                    if part is not None and part.out_scale is not None:
                        total[:, columns] += term.weight * (part.out_scale - 1) * base[:, columns]
                    if part is not None and part.factors is not None:
                        hidden = shrink(inputs[rows], part.factors.a)  # [n, r]
                        total[:, columns] += term.weight * hidden @ part.factors.b.float().T
                    if part is not None and part.shift is not None:
                        total[:, columns] += term.weight * part.shift
                    column += size
            y[rows] = total.to(y.dtype)


def _mapped(delta: SlotDelta, change: Callable[[torch.Tensor], torch.Tensor]) -> SlotDelta:
    """``delta`` with ``change`` applied to each tensor there is."""

    def maybe(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else change(tensor)

    parts = tuple(
        part
        and part._replace(
            factors=part.factors and Factors(change(part.factors.a), change(part.factors.b)),
            out_scale=maybe(part.out_scale),
            shift=maybe(part.shift),
        )
        for part in delta.parts
    )
    return SlotDelta(parts, maybe(delta.in_scale))


class ReferenceLora:
    """The backend every other one is compared with. Runs anywhere, fast nowhere."""

    name = "reference"

    def __init__(self) -> None:
        self.slots = SlotBook()

    def new_table(
        self, in_features: int, part_sizes: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, max_bytes: int
    ) -> LoraTable:
        """A table; ``max_bytes`` is not enforced, because a dict has nothing to reserve."""
        del max_bytes
        return ReferenceTable(in_features, part_sizes, dtype, device, self.slots)

    def prepare(self, plan: SegmentPlan) -> StepPlan:
        self.slots.check(plan)
        return ReferencePlan(plan)

    def static_plan(self, max_rows: int, max_terms: int) -> StaticStepPlan | None:
        del max_rows, max_terms
        return None

    def graph_key(self, plan: SegmentPlan) -> Hashable:
        return bool(plan.segments)

    def fence(self) -> Fence:
        return AlwaysDone()
