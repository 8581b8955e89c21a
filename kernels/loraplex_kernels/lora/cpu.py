"""The segmented low-rank product on a CPU.

Two ways, chosen for each segment by what they cost: small ones (decodes) all together in one call of our own compiled
kernel, which reads each slot's factors once in their true ranks; large ones (prefill chunks) by the matrix library,
whose calls are dear and whose arithmetic is faster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch

from loraplex_kernels.lanes import VECTOR_BYTES
from loraplex_kernels.lora import Fence, LoraTable, Packed, SlotDelta, StaticStepPlan, StepPlan
from loraplex_kernels.lora.cpu_factors import BLOCK_ROWS, SlotFactors
from loraplex_kernels.lora.cpu_vectors import RowVectors, Vectors, VectorTable, summed
from loraplex_kernels.lora.factors import check_rows, fit_delta
from loraplex_kernels.lora.fence import AlwaysDone
from loraplex_kernels.lora.slots import SlotBook
from loraplex_kernels.segments import Segment, SegmentPlan, Term

if TYPE_CHECKING:  # imported when the backend is made: a server on a GPU needs no second compiler
    from loraplex_kernels.cpu_ir import Kernel

# Plans kept from the last steps: in a run of decodes the same plan comes back step after step, for the layers and for
# the head.
KEPT_PLANS = 4


@dataclass(frozen=True, slots=True)
class Costs:
    """Microseconds: of a library call before it starts, and of a million multiplications by the library and by us."""

    call: float
    library: float
    ours: float


# Measured on two cores with AVX512-BF16 at the shapes of a 135M model; our kernel runs on one thread.
COSTS = {torch.bfloat16: Costs(13.0, 6.7, 9.0), torch.float32: Costs(3.0, 13.0, 20.0)}


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
    """What ``cpu_kernels.add_segments`` reads, and the tensors whose memory its addresses point into."""

    tail: tuple[int, ...]  # its arguments from ``in`` on
    held: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Work:
    """What one plan means for one table as it stands."""

    plan: StepPlan
    small: _Small | None
    singles: tuple[_Single, ...]
    vectors: RowVectors


@dataclass(frozen=True, slots=True)
class TableShape:
    """What a table is made for, and the bytes it may hold."""

    in_features: int
    part_sizes: tuple[int, ...]
    dtype: torch.dtype
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled functions of one dtype."""

    products: Kernel
    vectors: Kernel


class CpuTable:
    """Slots in true ranks. Owner: the layer it belongs to.

    A slot is a reference to what ``pack`` made: nothing is copied, and an adapter is in memory once.
    """

    def __init__(self, shape: TableShape, kernels: Kernels | None, book: SlotBook) -> None:
        """``kernels`` are those of the table's dtype; without them the library does every segment."""
        self.in_features = shape.in_features
        self.part_sizes = shape.part_sizes
        self._dtype = shape.dtype
        self._max_bytes = shape.max_bytes
        self._used_bytes = 0
        self._slots: dict[int, SlotFactors] = {}
        self._num_vectors = 0  # slots that have any
        self._book = book
        self._kernel = None if kernels is None else kernels.products
        self._costs = COSTS.get(shape.dtype) if kernels is not None else None
        widths = shape.in_features, sum(shape.part_sizes)
        self._vector_table = VectorTable(widths, shape.dtype, None if kernels is None else kernels.vectors)
        self._work: _Work | None = None

    def pack(self, delta: SlotDelta) -> Packed:
        fitted = fit_delta(delta, in_features=self.in_features, part_sizes=self.part_sizes, dtype=self._dtype)
        return SlotFactors(fitted, self.part_sizes)

    def write(self, slot: int, packed: Packed) -> None:
        assert isinstance(packed, SlotFactors)
        if slot < 0:
            raise ValueError(f"slot {slot} is negative")
        held = self._slots[slot].nbytes if slot in self._slots else 0
        if self._used_bytes - held + packed.nbytes > self._max_bytes:
            raise MemoryError(
                f"slot {slot}: {packed.nbytes} bytes do not fit; {self._used_bytes - held} of the table's "
                f"{self._max_bytes} bytes are in use"
            )
        self.clear(slot)
        self._slots[slot] = packed
        self._used_bytes += packed.nbytes
        self._num_vectors += bool(packed.vectors)
        self._book.filled(slot)

    def clear(self, slot: int) -> None:
        held = self._slots.pop(slot, None)
        if held is not None:
            self._used_bytes -= held.nbytes
            self._num_vectors -= bool(held.vectors)
            self._book.emptied(slot)
        self._work = None

    def scale_input(self, x: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        if not self._num_vectors:
            return x
        return self._work_of(plan).vectors.scaled(x)

    def add_(self, y: torch.Tensor, x: torch.Tensor, plan: StepPlan) -> None:
        check_rows(y, x, plan.segments.num_rows, self.part_sizes)
        work = self._work_of(plan)
        work.vectors.change_(y)  # before the products: out_scale is of what the layer's own weight gave
        if work.small is not None:
            self._add_small(y, x if x.stride(1) == 1 else x.contiguous(), work.small)
        for single in work.singles:
            h = torch.mm(single.factors.a[:, : self.in_features], x[single.rows].t())  # [rows of A, n]
            single.factors.add_(y[single.rows], h if single.weight == 1.0 else h.mul_(single.weight))

    def add_lookup_(self, y: torch.Tensor, token_ids: torch.Tensor, plan: StepPlan) -> None:
        check_rows(y, token_ids, plan.segments.num_rows, self.part_sizes)
        if self._num_vectors:
            self._work_of(plan).vectors.change_(y)
        for segment in plan.segments.segments:
            rows = slice(segment.start, segment.stop)
            for term in segment.terms:
                factors = self._slots.get(term.slot)
                if factors is not None and factors.parts:
                    h = factors.a.index_select(1, token_ids[rows])  # [rows of A, n]
                    factors.add_(y[rows], h if term.weight == 1.0 else h.mul_(term.weight))

    def _add_small(self, y: torch.Tensor, x: torch.Tensor, small: _Small) -> None:
        assert self._kernel is not None
        # the kernel writes where it is told: nothing else stands between a wrong tensor and other memory
        if x.dtype is not self._dtype or y.dtype is not self._dtype or y.stride(1) != 1:
            raise ValueError(
                f"x is {x.dtype} and y {y.dtype} with strides {y.stride()}; the table needs both in {self._dtype}, "
                f"and y's rows whole"
            )
        if x.shape[1] != self.in_features:
            raise ValueError(f"x is {list(x.shape)}, the table needs {self.in_features} columns")
        item = x.itemsize
        self._kernel(x.data_ptr(), y.data_ptr(), x.stride(0) * item, y.stride(0) * item, *small.tail)

    def split(self, plan: SegmentPlan) -> tuple[int, int]:
        """How many products of a plan the kernel does here, and how many the library."""
        small, singles = self._split(plan)
        return len(small), len(singles)

    def _work_of(self, plan: StepPlan) -> _Work:
        if self._work is None or self._work.plan is not plan:
            small, singles = self._split(plan.segments)
            self._work = _Work(
                plan, self._small(small) if small else None, tuple(singles), self._vectors(plan.segments)
            )
        return self._work

    def _vectors(self, plan: SegmentPlan) -> RowVectors:
        found: list[tuple[slice, Vectors]] = []
        for segment in plan.segments if self._num_vectors else ():
            terms = [
                (term.weight, self._slots[term.slot].vectors) for term in segment.terms if term.slot in self._slots
            ]
            found.append((slice(segment.start, segment.stop), summed(terms)))
        return self._vector_table.prepare(found)

    def _split(self, plan: SegmentPlan) -> tuple[list[tuple[Segment, Term, SlotFactors]], list[_Single]]:
        small: list[tuple[Segment, Term, SlotFactors]] = []
        singles: list[_Single] = []
        for segment in plan.segments:
            for term in segment.terms:
                factors = self._slots.get(term.slot)
                if factors is None or not factors.parts:
                    continue
                if self._is_small(segment.stop - segment.start, factors):
                    small.append((segment, term, factors))
                else:
                    singles.append(_Single(slice(segment.start, segment.stop), term.weight, factors))
        return small, singles

    def _is_small(self, num_rows: int, factors: SlotFactors) -> bool:
        if self._costs is None:
            return False
        millions = num_rows * factors.multiplications_per_row / 1e6
        calls = 1 + len(factors.parts)
        return millions * self._costs.ours <= calls * self._costs.call + millions * self._costs.library

    def _small(self, work: list[tuple[Segment, Term, SlotFactors]]) -> _Small:
        item = self._dtype.itemsize
        tiles: list[tuple[int, ...]] = []
        for segment, _, factors in work:
            tiles.append((segment.start, segment.stop, *factors.tile))
        tile_table = np.array(tiles, dtype=np.int64)
        weights = np.array([term.weight for _, term, _ in work], dtype=np.float32)
        h_stride = max(factors.a.shape[0] for _, _, factors in work) * item
        scratch_x = np.empty(BLOCK_ROWS * (self.in_features * item + VECTOR_BYTES), dtype=np.uint8)
        scratch_h = np.empty(BLOCK_ROWS * h_stride, dtype=np.uint8)
        tail = (
            self.in_features,
            tile_table.ctypes.data,
            len(tiles),
            weights.ctypes.data,
            scratch_x.ctypes.data,
            scratch_h.ctypes.data,
            h_stride,
        )
        return _Small(tail, (tile_table, weights, scratch_x, scratch_h, [factors for _, _, factors in work]))


class CpuLora:
    """The fast backend for CPU tensors. Making one compiles its kernels."""

    name = "cpu"

    def __init__(self, *, compiled: bool = True) -> None:
        """``compiled=False`` leaves every segment to the library, as on a processor that has no kernel."""
        from loraplex_kernels.cpu_ir import has_kernel
        from loraplex_kernels.lora.cpu_kernels import compile_kernel
        from loraplex_kernels.lora.cpu_vector_kernel import compile_vector_kernel

        self._plans: deque[CpuStepPlan] = deque(maxlen=KEPT_PLANS)
        self.slots = SlotBook()
        self._kernels = {
            dtype: Kernels(compile_kernel(dtype), compile_vector_kernel(dtype))
            for dtype in COSTS
            if compiled and has_kernel(dtype)
        }

    def new_table(
        self, in_features: int, part_sizes: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, max_bytes: int
    ) -> LoraTable:
        del device  # the CPU, or this backend would not have been chosen
        return CpuTable(TableShape(in_features, part_sizes, dtype, max_bytes), self._kernels.get(dtype), self.slots)

    def prepare(self, plan: SegmentPlan) -> StepPlan:
        self.slots.check(plan)  # a plan that was kept, too: its slots may have been cleared since
        for kept in self._plans:
            if kept.segments == plan:
                return kept
        made = CpuStepPlan(plan)
        self._plans.append(made)
        return made

    def static_plan(self, max_rows: int, max_terms: int) -> StaticStepPlan | None:
        del max_rows, max_terms
        return None

    def graph_key(self, plan: SegmentPlan) -> Hashable:
        return bool(plan.segments)

    def fence(self) -> Fence:
        return AlwaysDone()


def available(device: torch.device) -> str | None:
    """Why this backend cannot run on the device; None when it can."""
    if device.type != "cpu":
        return f"it runs on cpu tensors, the device is {device}"
    return None if find_spec("llvmlite") else "the package llvmlite is not installed"
