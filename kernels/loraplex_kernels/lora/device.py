"""The segmented low-rank product of a device: tables, plans and checks around kernels that it is given.

Knows which kernel a table needs and when none; not how one computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex_kernels.lora import Fence, LoraTable, Packed, SlotDelta, StaticStepPlan, StepPlan
from loraplex_kernels.lora.device_layout import Form, Forms
from loraplex_kernels.lora.device_plan import (
    PLAIN,
    SCALED,
    DevicePlan,
    PlanWriter,
    StaticDevicePlan,
    describe,
    slots_of,
)
from loraplex_kernels.lora.device_scratch import Scratch
from loraplex_kernels.lora.device_table import DevicePacked, DeviceSide, SlotMemory, pack_delta
from loraplex_kernels.lora.factors import check_rows, fit_delta
from loraplex_kernels.lora.fence import AlwaysDone
from loraplex_kernels.lora.slots import SlotBook
from loraplex_kernels.lora.uploads import Copy, DeviceQueue
from loraplex_kernels.segments import SegmentPlan

#: kernels address within a tile by 32 bits: rows of a tile times a row's stride stay far below 2^31
MAX_STRIDE = 1 << 24


@dataclass(frozen=True, slots=True)
class Shape:
    """What kernels need to know of a table, for one form. Nothing in it ever changes."""

    form: Form
    in_features: int
    part_sizes: tuple[int, ...]
    splits: int
    chunk: int
    columns: torch.Tensor  # int32 [n, COLUMN_WORDS]
    root: torch.Tensor
    header: torch.Tensor


class Kernels(Protocol):
    """The launches of a device op. Everything has been checked; nothing here may synchronize or allocate."""

    forms: Forms
    fused: bool
    """Whether ``add`` is one launch."""

    def add(self, y: torch.Tensor, x: torch.Tensor, plan: DevicePlan, shape: Shape) -> None:
        """``LoraTable.add_``."""
        ...

    def add_lookup(self, y: torch.Tensor, token_ids: torch.Tensor, plan: DevicePlan, shape: Shape) -> None:
        """``LoraTable.add_lookup_``."""
        ...

    def scale(self, out: torch.Tensor, x: torch.Tensor, plan: DevicePlan, shape: Shape) -> None:
        """``LoraTable.scale_input`` into ``out``."""
        ...


class DeviceTable:
    """One layer's slots. Owner: the layer."""

    def __init__(self, shapes: dict[Form, Shape], dtype: torch.dtype, memory: SlotMemory, backend: DeviceLora) -> None:
        shape = next(iter(shapes.values()))
        self.in_features = shape.in_features
        self.part_sizes = shape.part_sizes
        self._shapes = shapes
        self._dtype = dtype
        self._device = shape.root.device
        self._memory = memory
        self._backend = backend

    def pack(self, delta: SlotDelta) -> Packed:
        fitted = fit_delta(delta, in_features=self.in_features, part_sizes=self.part_sizes, dtype=self._dtype)
        return pack_delta(fitted, self._backend.side.queue)

    def write(self, slot: int, packed: Packed) -> None:
        assert isinstance(packed, DevicePacked)
        if slot < 0:
            raise ValueError(f"slot {slot} is negative")
        self._backend.uploaded(self._memory.write(slot, packed))

    def clear(self, slot: int) -> None:
        self._memory.clear(slot)

    def scale_input(self, x: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        assert isinstance(plan, DevicePlan)
        if not plan.scales_input(self._memory.scaling):
            return x
        x = self._readable(x, plan)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._memory.settle(plan.slots, arrived=False)
        self._backend.kernels.scale(out, x, plan, self._shapes[plan.form])
        return out

    def add_(self, y: torch.Tensor, x: torch.Tensor, plan: StepPlan) -> None:
        assert isinstance(plan, DevicePlan)
        check_rows(y, x, plan.segments.num_rows, self.part_sizes)
        self._check_y(y, x)
        x = self._readable(x, plan)
        if self._launches(plan):
            self._backend.kernels.add(y, x, plan, self._shapes[plan.form])

    def add_lookup_(self, y: torch.Tensor, token_ids: torch.Tensor, plan: StepPlan) -> None:
        assert isinstance(plan, DevicePlan)
        check_rows(y, token_ids, plan.segments.num_rows, self.part_sizes)
        self._check_y(y, token_ids)
        if token_ids.dtype is not torch.int64 or token_ids.device != self._device or token_ids.dim() != 1:
            raise ValueError(
                f"token ids are {token_ids.dtype} {list(token_ids.shape)} on {token_ids.device}, the table needs "
                f"torch.int64 [T] on {self._device}"
            )
        if self._launches(plan):
            self._backend.kernels.add_lookup(y, token_ids.contiguous(), plan, self._shapes[plan.form])

    def can_join(self, in_features: int, part_sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether one launch may do the product of such a layer and this table's ``add_``."""
        mine = (self.in_features, self.part_sizes, self._dtype, self._device)
        return self._backend.kernels.fused and mine == (in_features, part_sizes, dtype, device)

    def reading(self, x: torch.Tensor, plan: DevicePlan) -> tuple[torch.Tensor, DevicePlan, Shape] | None:
        """What the next launch reads when it does this table's ``add_``, too; None when there is nothing to add."""
        x = self._readable(x, plan)
        return (x, plan, self._shapes[plan.form]) if self._launches(plan) else None

    def _launches(self, plan: DevicePlan) -> bool:
        if plan.may_skip and not self._memory.holds_any(plan.slots):
            return False
        self._memory.settle(plan.slots, arrived=False)
        return True

    def _check_y(self, y: torch.Tensor, rows: torch.Tensor) -> None:
        if y.dtype is not self._dtype or y.device != self._device or not y.is_contiguous():
            raise ValueError(
                f"y is {y.dtype} on {y.device} with strides {y.stride()}; the table needs it in {self._dtype} on "
                f"{self._device}, and y's rows whole"
            )
        if y.numel() and rows.numel() and _overlap(y, rows):
            raise ValueError("y and its input share memory; the table needs an input that does not alias y")

    def _readable(self, x: torch.Tensor, plan: DevicePlan) -> torch.Tensor:
        if x.dtype is not self._dtype or x.device != self._device:
            raise ValueError(f"x is {x.dtype} on {x.device}, the table needs it in {self._dtype} on {self._device}")
        if x.shape != (plan.segments.num_rows, self.in_features):
            raise ValueError(
                f"x is {list(x.shape)}, the table needs {self.in_features} columns and the step "
                f"{plan.segments.num_rows} rows"
            )
        return x if x.stride(1) == 1 and 0 <= x.stride(0) < MAX_STRIDE else x.contiguous()


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the stretches of memory from first to last element meet. No stride is negative in torch."""
    (start, stop), (first, last) = _stretch(one), _stretch(other)
    return start < last and first < stop


def _stretch(tensor: torch.Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.itemsize


class DeviceLora:
    """A backend for one device, that of its first table. Steps are launched on one stream, one after the other."""

    def __init__(self, name: str, kernels: Kernels, queue_for: Callable[[torch.device], DeviceQueue]) -> None:
        self.name = name
        self.kernels = kernels
        self._queue_for = queue_for
        self.slots = SlotBook()
        forms = kernels.forms
        self._planes = dict.fromkeys((forms.decode, forms.wide, forms.prefill), 1)
        self._last_upload: Copy = AlwaysDone()
        self._side: DeviceSide | None = None

    @property
    def side(self) -> DeviceSide:
        """What the tables share; there is none before the first table."""
        assert self._side is not None, "no table has been made yet"
        return self._side

    def new_table(
        self, in_features: int, part_sizes: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, max_bytes: int
    ) -> LoraTable:
        if max(in_features, sum(part_sizes)) >= MAX_STRIDE:
            raise ValueError(f"a table of {in_features} inputs and parts {part_sizes}: kernels take < {MAX_STRIDE}")
        side = self._side_on(device)
        memory = SlotMemory(len(part_sizes), max_bytes, side)
        shapes = {}
        for form in self._planes:
            tiles = torch.tensor(form.columns(part_sizes), dtype=torch.int32)
            columns = side.queue.allocate(tiles.nbytes).view(torch.int32).view(tiles.shape)
            columns.copy_(tiles)
            splits = form.splits(in_features)
            self._planes[form] = max(self._planes[form], splits)
            chunk = form.chunk(in_features)
            shapes[form] = Shape(
                form, in_features, part_sizes, splits, chunk, columns, memory.root, side.scratch.header
            )
        return DeviceTable(shapes, dtype, memory, self)

    def prepare(self, plan: SegmentPlan) -> StepPlan:
        form = self.kernels.forms.of(plan.num_rows)
        if not plan.segments:
            return DevicePlan(plan, form, torch.empty(0, dtype=torch.int32), (0, 0, 0))
        self.slots.check(plan)
        writer = PlanWriter(self.side, self._planes)
        writer.make_ready(plan)
        described = describe(plan, plan.num_rows, form.block_m)
        limits = (described.num_tiles, described.num_pairs, described.num_visits)
        return DevicePlan(plan, form, writer.write(described, form), limits)

    def static_plan(self, max_rows: int, max_terms: int) -> StaticStepPlan | None:
        form = self.kernels.forms.of(max_rows)
        return StaticDevicePlan(max_rows, max_terms, form, PlanWriter(self.side, self._planes))

    def graph_key(self, plan: SegmentPlan) -> Hashable:
        """None without adapters; else whether any scales its input, the only launches that depend on the slots."""
        if not plan.segments:
            return None
        scaling = self.side.scaling
        return SCALED if scaling and not scaling.keys().isdisjoint(slots_of(plan)) else PLAIN

    def fence(self) -> Fence:
        return self._last_upload  # the last that has begun: copies beside the steps end in their order

    def uploaded(self, copy: Copy) -> None:
        """A table has begun an upload."""
        self._last_upload = copy

    def _side_on(self, device: torch.device) -> DeviceSide:
        if self._side is None:
            queue = self._queue_for(device)
            self._side = DeviceSide(queue, Scratch(queue), self.slots, set(), Counter())
        if self._side.queue.device != device:
            raise ValueError(f"a table on {device}: the backend's first table is on {self._side.queue.device}")
        return self._side
