"""The segmented low-rank product, written to be checked by eye: one loop over segments, terms and parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from loraplex_kernels.lora import Factors, LoraTable, StepPlan
from loraplex_kernels.lora.factors import check_rows, fit_parts
from loraplex_kernels.segments import SegmentPlan


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """The segments as they are: this backend needs nothing else."""

    segments: SegmentPlan


class ReferenceTable:
    """Slot -> factors in a dict. Sums in float32, rounds once into y."""

    def __init__(self, in_features: int, part_sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.in_features = in_features
        self.part_sizes = part_sizes
        self._dtype = dtype
        self._device = device
        self._slots: dict[int, tuple[Factors | None, ...]] = {}

    def write(self, slot: int, parts: Sequence[Factors | None]) -> None:
        fitted = fit_parts(slot, parts, in_features=self.in_features, part_sizes=self.part_sizes, dtype=self._dtype)
        self._slots[slot] = tuple(
            None if part is None else Factors(*(tensor.to(self._device, copy=True) for tensor in part))
            for part in fitted
        )

    def clear(self, slot: int) -> None:
        self._slots.pop(slot, None)

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
            total = y[rows].float()  # [n, sum(part_sizes)]
            for term in segment.terms:
                column = 0
                for part, size in zip(self._slots.get(term.slot, ()), self.part_sizes, strict=False):
                    if part is not None:
                        hidden = shrink(inputs[rows], part.a)  # [n, r]
                        total[:, column : column + size] += term.weight * hidden @ part.b.float().T
                    column += size
            y[rows] = total.to(y.dtype)


class ReferenceLora:
    """The backend every other one is compared with. Runs anywhere, fast nowhere."""

    name = "reference"

    def new_table(
        self, in_features: int, part_sizes: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, max_bytes: int
    ) -> LoraTable:
        """A table; ``max_bytes`` is not enforced, because a dict has nothing to reserve."""
        del max_bytes
        return ReferenceTable(in_features, part_sizes, dtype, device)

    def prepare(self, plan: SegmentPlan) -> StepPlan:
        return ReferencePlan(plan)
