"""Scales and shifts on a CPU: held by slot, summed over a segment's terms and applied to its rows.

One compiled call does all segments of a layer; a processor that has no kernel takes a library call for each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from loraplex_kernels.lora import SlotDelta

if TYPE_CHECKING:  # imported when the backend is made: a server on a GPU needs no second compiler
    from loraplex_kernels.cpu_ir import Kernel


@dataclass(frozen=True, slots=True)
class Vectors:
    """What a slot, or a segment, multiplies and adds, in float32; None: nothing."""

    in_scale: torch.Tensor | None  # [in]
    out_scale: torch.Tensor | None  # [sum(part_sizes)], 1 in parts that have none
    shift: torch.Tensor | None  # [sum(part_sizes)], 0 in parts that have none

    @property
    def nbytes(self) -> int:
        return sum(v.nbytes for v in (self.in_scale, self.out_scale, self.shift) if v is not None)

    def __bool__(self) -> bool:
        return self.in_scale is not None or self.out_scale is not None or self.shift is not None


class Change(NamedTuple):
    """``y[rows] = y[rows] * scale + shift``, computed in float32 and rounded once."""

    rows: slice
    scale: torch.Tensor | None  # [width]
    shift: torch.Tensor | None  # [width]


class Changes(Protocol):
    """Changes of one matrix's rows, made ready to be applied again and again."""

    def apply_(self, y: torch.Tensor) -> None: ...


class LibraryChanges:
    """One library call each."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = tuple(changes)

    def apply_(self, y: torch.Tensor) -> None:
        for rows, scale, shift in self._changes:
            part = y[rows]
            if scale is not None and shift is not None:
                part.copy_(torch.addcmul(shift, part.float(), scale))
            elif scale is not None:
                part.mul_(scale)
            elif shift is not None:
                part.add_(shift)


class CompiledChanges:
    """All of them in one call of ``cpu_vector_kernel.change_rows``."""

    def __init__(self, changes: Sequence[Change], kernel: Kernel, dtype: torch.dtype, width: int) -> None:
        """``kernel`` is that of ``dtype``."""
        self._kernel, self._dtype, self._width = kernel, dtype, width
        ones, zeros = neutral(width)
        self._held = (changes, ones, zeros)  # the memory that the addresses point into
        self._num_rows = max(rows.stop for rows, _, _ in changes)
        self._tiles = np.array(
            [
                (
                    rows.start,
                    rows.stop,
                    (ones if scale is None else scale).data_ptr(),
                    (zeros if shift is None else shift).data_ptr(),
                )
                for rows, scale, shift in changes
            ],
            dtype=np.int64,
        )
        self._tail = (self._width, self._tiles.ctypes.data, len(self._tiles))

    def apply_(self, y: torch.Tensor) -> None:
        # the kernel writes where it is told: nothing else stands between a wrong tensor and other memory
        num_rows, width = y.shape
        if y.dtype is not self._dtype or y.stride(1) != 1 or width != self._width or num_rows < self._num_rows:
            raise ValueError(
                f"rows to scale and shift are {y.dtype} {list(y.shape)} with strides {y.stride()}; the table needs "
                f"them in {self._dtype}, {self._num_rows} or more of {self._width} columns, each row whole"
            )
        self._kernel(y.data_ptr(), y.stride(0) * y.itemsize, *self._tail)


@functools.cache  # never written to
def neutral(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale and a shift that keep every bit: adding 0 would turn -0 into 0."""
    return torch.ones(width), torch.full((width,), -0.0)


class RowVectors:
    """What the vectors of one step's segments do at one table."""

    def __init__(self, inputs: Changes | None, outputs: Changes | None) -> None:
        self._inputs = inputs
        self._outputs = outputs

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """x itself when nothing scales it, else a new tensor."""
        if self._inputs is None:
            return x
        x = x.clone(memory_format=torch.contiguous_format)
        self._inputs.apply_(x)
        return x

    def change_(self, y: torch.Tensor) -> None:
        if self._outputs is not None:
            self._outputs.apply_(y)


class VectorTable:
    """Makes the ``RowVectors`` of one table."""

    def __init__(self, widths: tuple[int, int], dtype: torch.dtype, kernel: Kernel | None) -> None:
        """``widths``: of x and of y. ``kernel`` is that of ``dtype``; without one the library does every segment."""
        self._widths = widths
        self._dtype = dtype
        self._kernel = kernel

    def prepare(self, segments: Sequence[tuple[slice, Vectors]]) -> RowVectors:
        inputs = [Change(rows, v.in_scale, None) for rows, v in segments if v.in_scale is not None]
        outputs = [
            Change(rows, v.out_scale, v.shift) for rows, v in segments if v.out_scale is not None or v.shift is not None
        ]
        return RowVectors(self._changes(inputs, self._widths[0]), self._changes(outputs, self._widths[1]))

    def _changes(self, changes: Sequence[Change], width: int) -> Changes | None:
        if not changes:
            return None
        if self._kernel is None:
            return LibraryChanges(changes)
        return CompiledChanges(changes, self._kernel, self._dtype, width)


def pack_vectors(delta: SlotDelta, sizes: tuple[int, ...]) -> Vectors:
    """The vectors of a delta that fits a table of these part sizes, in memory of their own."""
    scales = [part and part.out_scale for part in delta.parts]
    shifts = [part and part.shift for part in delta.parts]
    in_scale = None if delta.in_scale is None else delta.in_scale.clone(memory_format=torch.contiguous_format)
    return Vectors(in_scale, _joined(scales, sizes, 1.0), _joined(shifts, sizes, 0.0))


def summed(terms: Sequence[tuple[float, Vectors]]) -> Vectors:
    """What weighted terms come to together: ``1 + sum c (scale - 1)`` and ``sum c shift``."""
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]  # the very memory of the slot, and no rounding
    return Vectors(
        _scale([(weight, vectors.in_scale) for weight, vectors in terms]),
        _scale([(weight, vectors.out_scale) for weight, vectors in terms]),
        _shift([(weight, vectors.shift) for weight, vectors in terms]),
    )


def _joined(vectors: list[torch.Tensor | None], sizes: tuple[int, ...], neutral: float) -> torch.Tensor | None:
    if all(vector is None for vector in vectors):
        return None
    pieces = zip(vectors, sizes, strict=True)
    return torch.cat([torch.full((size,), neutral) if vector is None else vector for vector, size in pieces])


def _scale(terms: list[tuple[float, torch.Tensor | None]]) -> torch.Tensor | None:
    changes = [weight * (scale - 1) for weight, scale in terms if scale is not None]
    return torch.stack(changes).sum(0).add_(1) if changes else None


def _shift(terms: list[tuple[float, torch.Tensor | None]]) -> torch.Tensor | None:
    shifts = [weight * shift for weight, shift in terms if shift is not None]
    return torch.stack(shifts).sum(0) if shifts else None
