"""Quantized products on a device: matrices and checks around kernels that they are given.

Knows which launches a product needs; not how one computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from loraplex_kernels.lora import LoraTable, StepPlan
from loraplex_kernels.lora.device import MAX_STRIDE, DeviceTable, Shape
from loraplex_kernels.lora.device_plan import DevicePlan
from loraplex_kernels.lora.uploads import DeviceQueue
from loraplex_kernels.quant import Joined, QuantMatrix
from loraplex_kernels.quant.device_layout import Form, Forms
from loraplex_kernels.quant.device_stack import Stack, stack_parts
from loraplex_kernels.quant.reference import stacked_shape
from loraplex_kernels.quant.stored import StoredMatrix

#: steps of more rows are bound by their products: a launch more costs them nothing to speak of
JOINED_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class Tiling:
    """How products with a stack are cut in one form. Nothing in it ever changes or moves."""

    form: Form
    columns: torch.Tensor  # int32 [n, 4]
    splits: int
    chunk: int
    planes: torch.Tensor  # float32, of all products
    counters: torch.Tensor  # int32, of all products; zero between launches


@dataclass(frozen=True, slots=True)
class Rows:
    """A call's own: x ``[T, in]``, y ``[T, out]`` with a bias ``[out]`` or none, both from the stack's first column."""

    x: torch.Tensor
    y: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Terms:
    """What the adapters of a joined launch read."""

    x: torch.Tensor
    plan: DevicePlan
    shape: Shape


class Kernels(Protocol):
    """The launches of a device op. Everything has been checked; nothing here may synchronize or allocate."""

    forms: Forms

    def product(self, rows: Rows, stack: Stack, tiling: Tiling) -> None:
        """``y = x @ W.T + bias`` for the stack's columns of y."""
        ...

    def joined(self, rows: Rows, stack: Stack, tiling: Tiling, terms: Terms) -> None:
        """The same, then the table's ``add_``."""
        ...

    def rows(self, out: torch.Tensor, indices: torch.Tensor | None, stack: Stack) -> None:
        """The stack's rows in ``out``, whose rows are those of the whole matrix or of ``indices`` into it."""
        ...


class DeviceMatrix:
    """One layer's parts. Owner: the layer."""

    def __init__(self, parts: Sequence[StoredMatrix], dtype: torch.dtype, backend: DeviceQuant) -> None:
        self.shape = stacked_shape(parts)
        self._stacks = stack_parts(parts)
        self.nbytes = sum(part.nbytes for part in parts)
        self._dtype = dtype
        self._device = parts[0].codes.device
        self._kernels = backend.kernels
        self._queue = backend.queue_on(self._device)
        if max(self.shape) >= MAX_STRIDE:
            raise ValueError(f"a matrix of {list(self.shape)}: kernels take sides < {MAX_STRIDE}")
        self._tilings = [backend.tilings(stack, self.shape[0]) for stack in self._stacks]

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x, bias = self._checked(x, bias)
        y = self._new(len(x), self.shape[0])
        if len(x):
            form = self._kernels.forms.of(len(x))
            for stack, tilings in zip(self._stacks, self._tilings, strict=True):
                rows = Rows(_ordered(x, stack), y[:, stack.start :], None if bias is None else bias[stack.start :])
                self._kernels.product(rows, stack, tilings[form])
        return y

    def multiply_joined(
        self, scaled: torch.Tensor, bias: torch.Tensor | None, own: tuple[torch.Tensor, DevicePlan, Shape]
    ) -> torch.Tensor:
        """``multiply(scaled, bias)`` with a table's terms of x, plan and shape added, in one launch."""
        scaled, bias = self._checked(scaled, bias)
        (stack,), (tilings,) = self._stacks, self._tilings
        y = self._new(len(scaled), self.shape[0])
        rows = Rows(_ordered(scaled, stack), y, bias)
        self._kernels.joined(rows, stack, tilings[self._kernels.forms.of(len(scaled))], Terms(*own))
        return y

    def join(self, table: LoraTable) -> Joined | None:
        if len(self._stacks) != 1 or not isinstance(table, DeviceTable):
            return None
        sizes = self._stacks[0].part_sizes
        fits = table.can_join(self.shape[1], sizes, self._dtype, self._device)
        return JoinedProduct(self, table) if fits else None

    def dequantize(self) -> torch.Tensor:
        return self._decoded(self.shape[0], None)

    def look_up(self, indices: torch.Tensor) -> torch.Tensor:
        if indices.dtype is not torch.int64 or indices.device != self._device or indices.dim() != 1:
            raise ValueError(
                f"indices are {indices.dtype} {list(indices.shape)} on {indices.device}, the matrix needs torch.int64 "
                f"[T] on {self._device}"
            )
        return self._decoded(len(indices), indices.contiguous())

    def _decoded(self, num_rows: int, indices: torch.Tensor | None) -> torch.Tensor:
        out = self._new(num_rows, self.shape[1])
        if not num_rows:
            return out
        for stack in self._stacks:
            self._kernels.rows(out, indices, stack)
        ids = torch.arange(num_rows, device=self._device) if indices is None else indices
        for stack in self._stacks:
            if stack.order is not None:
                mine = (ids >= stack.start) & (ids < stack.start + sum(stack.part_sizes))
                ordered = torch.empty_like(out)
                ordered[:, stack.order] = out
                out = torch.where(mine[:, None], ordered, out)
        return out

    def _checked(self, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if x.dtype is not self._dtype or x.device != self._device or x.dim() != 2 or x.shape[1] != self.shape[1]:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)} on {x.device}, the matrix needs {self._dtype} [T, {self.shape[1]}] on "
                f"{self._device}"
            )
        if bias is not None and (bias.shape != (self.shape[0],) or bias.device != self._device):
            raise ValueError(f"the bias is {list(bias.shape)} on {bias.device}, the matrix has {self.shape[0]} outputs")
        readable = x.stride(1) == 1 and 0 <= x.stride(0) < MAX_STRIDE
        return x if readable else x.contiguous(), bias if bias is None else bias.contiguous()

    def _new(self, num_rows: int, columns: int) -> torch.Tensor:
        memory = self._queue.allocate(num_rows * columns * self._dtype.itemsize)
        return memory.view(self._dtype).view(num_rows, columns)


class JoinedProduct:
    """A matrix and the table of its layer, by one launch where a step is small (``Joined``)."""

    __slots__ = ("_matrix", "_table")

    def __init__(self, matrix: DeviceMatrix, table: DeviceTable) -> None:
        self._matrix = matrix
        self._table = table

    def __call__(
        self, scaled: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, plan: StepPlan
    ) -> torch.Tensor:
        assert isinstance(plan, DevicePlan)
        if not 0 < len(x) <= JOINED_ROWS:
            y = self._matrix.multiply(scaled, bias)
            self._table.add_(y, x, plan)
            return y
        own = self._table.reading(x, plan)
        if own is None:
            return self._matrix.multiply(scaled, bias)
        return self._matrix.multiply_joined(scaled, bias, own)


class DeviceQuant:
    """A backend for one device, that of its first matrix. Products are launched on one stream, one after the other."""

    def __init__(self, name: str, kernels: Kernels, queue_for: Callable[[torch.device], DeviceQueue]) -> None:
        self.name = name
        self.kernels = kernels
        self._queue_for = queue_for
        self._queue: DeviceQueue | None = None
        self._planes = torch.empty(0)
        self._counters = torch.empty(0)

    def matrix(self, parts: Sequence[StoredMatrix], dtype: torch.dtype) -> QuantMatrix:
        return DeviceMatrix(parts, dtype, self)

    def queue_on(self, device: torch.device) -> DeviceQueue:
        """The queue of a matrix's device, which must be that of all others."""
        if self._queue is None:
            self._queue = self._queue_for(device)
        if self._queue.device != device:
            raise ValueError(f"a matrix on {device}: the backend's first one is on {self._queue.device}")
        return self._queue

    def tilings(self, stack: Stack, width: int) -> dict[Form, Tiling]:
        """Of every form. ``width``: outputs of the whole matrix."""
        queue = self.queue_on(stack.codes.device)
        codes, made = stack.layout, {}
        splits = {form: form.splits(stack.part_sizes, stack.in_features, codes) for form in self.kernels.forms.all}
        cells = max(count * form.block_m * width if count > 1 else 0 for form, count in splits.items())
        self._reserve(queue, cells, 3 * max(len(form.columns(stack.part_sizes)) for form in splits))
        for form in splits:
            tiles = torch.tensor(form.columns(stack.part_sizes), dtype=torch.int32)
            columns = queue.allocate(tiles.nbytes).view(torch.int32).view(tiles.shape)
            columns.copy_(tiles)
            chunk = form.chunk(stack.part_sizes, stack.in_features, codes)
            made[form] = Tiling(form, columns, splits[form], chunk, self._planes, self._counters)
        return made

    def _reserve(self, queue: DeviceQueue, cells: int, counters: int) -> None:
        """Room for a product. What it outgrows stays with the matrices that have it: captured launches hold it."""
        if cells > self._planes.numel():
            self._planes = queue.allocate(4 * cells).view(torch.float32)
        if counters > self._counters.numel():
            self._counters = queue.allocate(4 * counters).view(torch.int32)
            self._counters.zero_()


def _ordered(x: torch.Tensor, stack: Stack) -> torch.Tensor:
    """x in the order of the stack's codes."""
    return x if stack.order is None else x.index_select(1, stack.order)
