"""The segmented low-rank product on a CPU.

Two ways, chosen for each segment by what they cost: small ones (decodes) all together in one call of our own compiled
kernel, which reads each slot's factors once in their true ranks; large ones (prefill chunks) by the matrix library, whose
calls are dear and whose arithmetic is faster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from loraplex_kernels.lora import Factors, LoraTable, StepPlan
from loraplex_kernels.lora.cpu_factors import SlotFactors
from loraplex_kernels.lora.factors import check_rows, fit_parts
from loraplex_kernels.segments import Segment, SegmentPlan, Term

# Plans kept from the last steps: in a run of decodes the same plan comes back step after step, for the layers and for
# the head.
KEPT_PLANS = 4


@dataclass(frozen=True, slots=True)
class Costs:
    """Microseconds: of a library call before it starts, and of a million multiplications by the library and by us."""

    call: float
    library: float
    ours: float


# Measured on two cores with AVX512-BF16 at the shapes of a 135M model: one thread of ours does about 37 G
# multiplications a second, the library's two about 150 G in bfloat16 and 75 G in float32.
COSTS = {torch.bfloat16: Costs(13.0, 6.7, 27.0), torch.float32: Costs(3.0, 13.0, 27.0)}

#: the numpy type that a torch type's bits travel in
STORED = {torch.bfloat16: np.uint16, torch.float32: np.float32}


class CpuStepPlan:
    """A SegmentPlan, and nothing of its own: what it means differs by table."""

    __slots__ = ("segments",)

    def __init__(self, segments: SegmentPlan) -> None:
        self.segments = segments


@dataclass(frozen=True, slots=True)
class _Single:
    rows: slice
    weight: float
    factors: SlotFactors


@dataclass(frozen=True, slots=True)
class _Small:
    """The arrays that ``cpu_kernels.add_segments`` reads, and the slots whose memory they point into."""

    tiles: np.ndarray[Any, np.dtype[np.int64]]
    weights: np.ndarray[Any, np.dtype[np.float32]]
    parts: np.ndarray[Any, np.dtype[np.int64]]
    scratch: tuple[np.ndarray[Any, np.dtype[np.float32]], ...]
    held: tuple[SlotFactors, ...]


@dataclass(frozen=True, slots=True)
class _Work:
    """What one plan means for one table as it stands."""

    plan: StepPlan
    small: _Small | None
    singles: tuple[_Single, ...]


class CpuTable:
    """Slots in true ranks. Owner: the layer it belongs to."""

    def __init__(self, in_features: int, part_sizes: tuple[int, ...], dtype: torch.dtype, max_bytes: int) -> None:
        self.in_features = in_features
        self.part_sizes = part_sizes
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._slots: dict[int, SlotFactors] = {}
        self._costs = COSTS.get(dtype)
        self._like = np.zeros(1, STORED.get(dtype, np.float32))
        self._shape = (in_features, sum(part_sizes))
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
        self._work = None

    def add_(self, y: torch.Tensor, x: torch.Tensor, plan: StepPlan) -> None:
        check_rows(y, x, plan.segments.num_rows, self.part_sizes)
        work = self._work
        if work is None or work.plan is not plan:
            work = self._work = self._prepare(plan)
        if work.small is not None:
            self._add_small(y, x if x.stride(1) == 1 else x.contiguous(), work.small)
        for single in work.singles:
            h = torch.mm(single.factors.a, x[single.rows].t())  # [sum of ranks, n]
            single.factors.add_(y[single.rows], h if single.weight == 1.0 else h.mul_(single.weight))

    def add_lookup_(self, y: torch.Tensor, token_ids: torch.Tensor, plan: StepPlan) -> None:
        check_rows(y, token_ids, plan.segments.num_rows, self.part_sizes)
        for segment in plan.segments.segments:
            rows = slice(segment.start, segment.stop)
            for term in segment.terms:
                factors = self._slots.get(term.slot)
                if factors is not None:
                    h = factors.a.index_select(1, token_ids[rows])  # [sum of ranks, n]
                    factors.add_(y[rows], h if term.weight == 1.0 else h.mul_(term.weight))

    def _add_small(self, y: torch.Tensor, x: torch.Tensor, small: _Small) -> None:
        from loraplex_kernels.lora.cpu_kernels import add_segments

        rows = np.array((x.data_ptr(), y.data_ptr(), x.stride(0), y.stride(0)), dtype=np.int64)
        add_segments(rows, self._shape, small.tiles, small.weights, small.parts, small.scratch, self._like)

    def _prepare(self, plan: StepPlan) -> _Work:
        small: list[tuple[Segment, Term, SlotFactors]] = []
        singles: list[_Single] = []
        for segment in plan.segments.segments:
            for term in segment.terms:
                factors = self._slots.get(term.slot)
                if factors is None:
                    continue
                if self._is_small(segment.stop - segment.start, factors):
                    small.append((segment, term, factors))
                else:
                    singles.append(_Single(slice(segment.start, segment.stop), term.weight, factors))
        return _Work(plan, self._small(small) if small else None, tuple(singles))

    def _is_small(self, num_rows: int, factors: SlotFactors) -> bool:
        if self._costs is None:  # float16: the kernel does not know its bits
            return False
        millions = num_rows * factors.multiplications_per_row / 1e6
        calls = 1 + len(factors.expansions)
        return millions * self._costs.ours <= calls * self._costs.call + millions * self._costs.library

    def _small(self, work: list[tuple[Segment, Term, SlotFactors]]) -> _Small:
        from loraplex_kernels.lora.cpu_kernels import BLOCK_COLUMNS, BLOCK_ROWS

        tiles: list[tuple[int, ...]] = []
        parts: list[tuple[int, ...]] = []
        for segment, _term, factors in work:
            first = len(parts)
            parts += [(e.rows.start, e.rank, e.b.data_ptr(), e.column, e.size) for e in factors.expansions]
            a = factors.a
            tiles.append((segment.start, segment.stop, a.data_ptr(), a.shape[0], first, len(parts)))
        most = max(factors.a.shape[0] for _, _, factors in work)
        scratch = tuple(
            np.zeros((BLOCK_ROWS, width), dtype=np.float32) for width in (self.in_features, most, BLOCK_COLUMNS)
        )
        return _Small(
            np.array(tiles, dtype=np.int64),
            np.array([term.weight for _, term, _ in work], dtype=np.float32),
            np.array(parts, dtype=np.int64),
            scratch,
            tuple(factors for _, _, factors in work),
        )


class CpuLora:
    """The fast backend for CPU tensors. Making one compiles its kernel, or takes it from numba's cache."""

    name = "cpu"

    def __init__(self) -> None:
        self._plans: deque[CpuStepPlan] = deque(maxlen=KEPT_PLANS)
        for dtype in COSTS:
            _compile(dtype)

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


def available(device: torch.device) -> str | None:
    """Why this backend cannot run on the device; None when it can."""
    if device.type != "cpu":
        return f"it runs on cpu tensors, the device is {device}"
    return None if find_spec("numba") else "the package numba is not installed"


def _compile(dtype: torch.dtype) -> None:
    """Run the kernel once at its smallest: compilation is by type, not by size."""
    table = CpuTable(1, (1,), dtype, 1 << 10)
    table.write(0, [Factors(torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype))])
    plan = CpuStepPlan(SegmentPlan(1, (Segment(0, 1, (Term(0),)),)))
    table.add_(torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype), plan)
