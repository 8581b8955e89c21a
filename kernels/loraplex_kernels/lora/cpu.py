"""The segmented low-rank product on a CPU.

Two ways, chosen for each run of segments by what they cost. A large segment (a prefill chunk) is multiplied by its own
slot alone. Many small segments (decodes) share one product with the stacked rows of all their slots, a selecting
mask, and one product back: a library call costs about as much as all the arithmetic of eight rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex_kernels.lora import Factors, LoraTable, StepPlan
from loraplex_kernels.lora.cpu_factors import SlotFactors, Stack, StackRange, adjacent
from loraplex_kernels.lora.cpu_plan import CpuStepPlan, Selection, Single
from loraplex_kernels.lora.factors import check_rows, fit_parts
from loraplex_kernels.segments import SegmentPlan

# What one library call is worth in multiplications: 13 us of a bf16 product at about 200 G/s, 3 us of a float32 one
# at about 50 G/s. Half precision has no fast path on x86 and counts as float32.
CALL_WORTH = {torch.bfloat16: 2_500_000}
CALL_WORTH_OTHER = 150_000

# Plans kept from the last steps: in a run of decodes the same plan comes back step after step, for the layers and for
# the head.
KEPT_PLANS = 4


@dataclass(frozen=True, slots=True)
class _SingleWork:
    rows: slice
    weight: float
    factors: SlotFactors


@dataclass(frozen=True, slots=True)
class _BlockWork:
    rows: slice
    stacked: StackRange
    selection: Selection


@dataclass(frozen=True, slots=True)
class _Work:
    """What one plan means for one table as it stands."""

    plan: StepPlan
    singles: tuple[_SingleWork, ...]
    blocks: tuple[_BlockWork, ...]


class CpuTable:
    """Slots in true ranks, and a stack of those that decode together (at most about twice their bytes more)."""

    def __init__(self, in_features: int, part_sizes: tuple[int, ...], dtype: torch.dtype, max_bytes: int) -> None:
        self.in_features = in_features
        self.part_sizes = part_sizes
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._slots: dict[int, SlotFactors] = {}
        self._stack = Stack(in_features, part_sizes, dtype)
        calls = 1 + len(adjacent(part_sizes, (1,) * len(part_sizes)))
        width = in_features * len(part_sizes) + sum(part_sizes)
        self._limit = calls * CALL_WORTH.get(dtype, CALL_WORTH_OTHER) // width
        self._work: _Work | None = None

    def write(self, slot: int, parts: Sequence[Factors | None]) -> None:
        fitted = fit_parts(slot, parts, in_features=self.in_features, part_sizes=self.part_sizes, dtype=self._dtype)
        needed = sum(part.a.nbytes + part.b.nbytes for part in fitted if part is not None)
        held = self._slots[slot].nbytes if slot in self._slots else 0
        if self._used_bytes - held + needed > self._max_bytes:
            raise MemoryError(
                f"slot {slot}: {needed} bytes of factors do not fit; {self._used_bytes - held} of the table's "
                f"{self._max_bytes} bytes are in use"
            )
        self.clear(slot)
        if needed:
            self._slots[slot] = SlotFactors(fitted, self.part_sizes)
            self._used_bytes += needed

    def clear(self, slot: int) -> None:
        factors = self._slots.pop(slot, None)
        if factors is not None:
            self._used_bytes -= factors.nbytes
            self._stack.forget(slot)
        self._work = None

    def add_(self, y: torch.Tensor, x: torch.Tensor, plan: StepPlan) -> None:
        check_rows(y, x, plan.segments.num_rows, self.part_sizes)
        work = self._work
        if work is None or work.plan is not plan:
            work = self._work = self._prepare(plan)
        for block in work.blocks:
            _add_block(y[block.rows], x[block.rows], block, len(self.part_sizes))
        for single in work.singles:
            h = torch.mm(single.factors.a, x[single.rows].t())  # [sum of ranks, n]
            if single.weight != 1.0:
                h.mul_(single.weight)
            single.factors.add_(y[single.rows], h)

    def add_lookup_(self, y: torch.Tensor, token_ids: torch.Tensor, plan: StepPlan) -> None:
        check_rows(y, token_ids, plan.segments.num_rows, self.part_sizes)
        for segment in plan.segments.segments:
            rows = slice(segment.start, segment.stop)
            for term in segment.terms:
                factors = self._slots.get(term.slot)
                if factors is not None:
                    h = factors.a.index_select(1, token_ids[rows])  # [sum of ranks, n]
                    factors.add_(y[rows], h if term.weight == 1.0 else h.mul_(term.weight))

    def _prepare(self, plan: StepPlan) -> _Work:
        assert isinstance(plan, CpuStepPlan), "a plan of another backend"
        slots = self._slots
        ranks = tuple(slots[slot].rank if slot in slots else 0 for slot in plan.slots)
        schedule = plan.schedule(ranks, self._limit)
        stacked = dict.fromkeys(slot for block in schedule.blocks for slot in block.slots)
        if stacked:
            self._stack.place({slot: slots[slot] for slot in stacked})
        blocks = []
        for block in schedule.blocks:
            stack_range = self._stack.range_of(block.slots)
            selection = plan.selection(block, stack_range.rows, stack_range.num_rows)
            blocks.append(_BlockWork(slice(block.start, block.stop), stack_range, selection))
        return _Work(plan, tuple(self._single(single) for single in schedule.singles), tuple(blocks))

    def _single(self, single: Single) -> _SingleWork:
        return _SingleWork(slice(single.start, single.stop), single.term.weight, self._slots[single.term.slot])


class CpuLora:
    """The fast backend for CPU tensors."""

    name = "cpu"

    def __init__(self) -> None:
        self._plans: deque[CpuStepPlan] = deque(maxlen=KEPT_PLANS)

    def new_table(
        self, in_features: int, part_sizes: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, max_bytes: int
    ) -> LoraTable:
        del device  # the CPU, or this backend would not have been chosen
        return CpuTable(in_features, part_sizes, dtype, max_bytes)

    def prepare(self, plan: SegmentPlan) -> StepPlan:
        for kept in self._plans:
            if kept.segments == plan:
                return kept
        made = CpuStepPlan(plan)
        self._plans.append(made)
        return made


def _add_block(y: torch.Tensor, x: torch.Tensor, block: _BlockWork, num_parts: int) -> None:
    stacked = block.stacked
    h = torch.mm(stacked.a, x.t()).view(stacked.num_rows, num_parts, -1)  # [n, parts, T]
    h.masked_fill_(block.selection.hidden, 0.0)
    if block.selection.weights is not None:
        h.mul_(block.selection.weights)
    for expansion in stacked.expansions:
        columns = expansion.columns
        expansion.add_(y, h.narrow(1, columns.part, columns.count).permute(1, 2, 0))
