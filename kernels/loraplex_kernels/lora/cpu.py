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
from loraplex_kernels.lora.cpu_plan import CpuStepPlan, Layout, Selection
from loraplex_kernels.lora.factors import check_rows, fit_parts
from loraplex_kernels.segments import SegmentPlan

# What one library call is worth in multiplications done in vain. Measured at 32 rows, four slots of rank 8 to 64 and 32
# slots: 12 M was best of 1, 2.5, 6, 12 and 30 M in bf16 (a call costs 13 us before it starts, and a small product runs
# far below the peak). A float32 call starts in 1 us; half precision has no fast path on x86 and counts as float32.
CALL_WORTH = {torch.bfloat16: 12_000_000}
CALL_WORTH_OTHER = 500_000

# Plans kept from the last steps: in a run of decodes the same plan comes back step after step, for the layers and for
# the head.
KEPT_PLANS = 4


@dataclass(frozen=True, slots=True)
class _SingleWork:
    rows: slice | None  # None: all of them
    weight: float
    factors: SlotFactors


@dataclass(frozen=True, slots=True)
class _BlockWork:
    rows: slice | None
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
            self._add_block(_rows(y, block.rows), _rows(x, block.rows), block)
        for single in work.singles:
            h = torch.mm(single.factors.a, _rows(x, single.rows).t())  # [sum of ranks, n]
            if single.weight != 1.0:
                h.mul_(single.weight)
            single.factors.add_(_rows(y, single.rows), h)

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
            layout = Layout(stack_range.rows, stack_range.num_rows, len(self.part_sizes), self._dtype.itemsize)
            rows = _slice(block.start, block.stop, plan)
            blocks.append(_BlockWork(rows, stack_range, plan.selection(block, layout)))
        singles = (
            _SingleWork(_slice(single.start, single.stop, plan), single.term.weight, slots[single.term.slot])
            for single in schedule.singles
        )
        return _Work(plan, tuple(singles), tuple(blocks))

    def _add_block(self, y: torch.Tensor, x: torch.Tensor, block: _BlockWork) -> None:
        stacked, selection = block.stacked, block.selection
        h = torch.mm(stacked.a, x.t()).view(selection.bits.shape)  # [n, parts, T]
        h.view(selection.bits.dtype).bitwise_and_(selection.bits)
        if selection.weights is not None:
            h.mul_(selection.weights)
        h = h.permute(1, 2, 0)  # [parts, T, n]
        for columns, b in zip(self._stack.columns, stacked.b, strict=True):
            columns.add_(y, h.narrow(0, columns.parts[0], len(columns.parts)), b)


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


def _slice(start: int, stop: int, plan: CpuStepPlan) -> slice | None:
    return None if stop - start == plan.segments.num_rows else slice(start, stop)


def _rows(tensor: torch.Tensor, rows: slice | None) -> torch.Tensor:
    """Rows of a tensor, without a view where all are meant: a view costs 1.3 us."""
    return tensor if rows is None else tensor[rows]
