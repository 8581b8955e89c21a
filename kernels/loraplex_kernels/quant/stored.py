"""The stored form of a quantized matrix: packed codes, and scales in one of three forms; what both come to.

::

    w[o, i] = (value(code[o, i]) - zero) * scale[o, g] * factor + shift[o, g]          g: the group of column i

in float32, then rounded to ``Scheme.rounded`` where that is set. ``zero`` is the scheme's own number, and each group's
where it has zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Final, TypeVar

import torch

from loraplex_kernels.quant.packing import row_bytes, unpack
from loraplex_kernels.quant.values import TABLES, Values

#: columns that share an outer scale of ``SuperScales``, and blocks that share one of ``NestedScales``
SUPER_COLUMNS: Final = 256
NESTED_BLOCKS: Final = 256
#: rows that ``StoredMatrix.rows`` may begin at a multiple of, whatever the scheme
ROW_STEP: Final = 128

S = TypeVar("S", bound="_Tensors")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How codes become numbers. ``group``: columns that share a scale; 0: all of a row. ``group_rows``: rows that do.

    ``rounded``: the dtype in which the format's library has its weights, where that is none of ours to choose.
    """

    values: Values
    group: int
    group_rows: int = 1
    zero: int = 0
    factor: float = 1.0
    rounded: torch.dtype | None = None

    def groups(self, columns: int) -> int:
        """How many scales a row of that many columns has."""
        return -(-columns // self.group) if self.group else 1


class _Tensors:
    """What a dataclass of tensors can do with all of them."""

    __slots__ = ()

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        values = (getattr(self, one.name) for one in fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if isinstance(value, torch.Tensor))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def is_like(self, other: _Tensors) -> bool:
        """Whether another of its class has the same tensors, each of the same dtype."""
        mine, theirs = ([getattr(all_of, one.name) for one in fields(self)] for all_of in (self, other))  # type: ignore[arg-type]
        return [getattr(one, "dtype", None) for one in mine] == [getattr(one, "dtype", None) for one in theirs]

    def map(self: S, change: Callable[[torch.Tensor], torch.Tensor]) -> S:
        """The same with every tensor changed."""
        changed: dict[str, Any] = {
            one.name: change(value)
            for one in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, one.name), torch.Tensor)
        }
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class PlainScales(_Tensors):
    """A floating scale for each group; ``zeros`` uint8, ``shifts`` floating. All ``[out / group_rows, groups]``."""

    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    shifts: torch.Tensor | None = None

    def fit(self, grid: tuple[int, int], columns: int) -> bool:
        """Whether they are those of a matrix of so many columns with scales ``grid``."""
        return all(tuple(tensor.shape) == grid for tensor in self.tensors)

    def expanded(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and shifts, each float32 ``[out / group_rows, groups]``."""
        return self.scales.float(), None if self.shifts is None else self.shifts.float()


@dataclass(frozen=True, slots=True)
class SuperScales(_Tensors):
    """GGUF's K-quants: small integers times a float16 of 256 columns.

    ``scale = outer_scales[o, i // 256] * scales[o, g]``, ``shift = -(outer_mins[o, i // 256] * mins[o, g])``.
    """

    scales: torch.Tensor  # uint8 or int8 [out, groups]
    outer_scales: torch.Tensor  # float16 [out, in / 256]
    mins: torch.Tensor | None = None  # uint8 [out, groups]
    outer_mins: torch.Tensor | None = None  # float16 [out, in / 256]

    zeros = None

    def fit(self, grid: tuple[int, int], columns: int) -> bool:
        """Whether they are those of a matrix of so many columns with scales ``grid``."""
        outer = grid[0], columns // SUPER_COLUMNS
        found = [one for one in (self.outer_scales, self.outer_mins) if one is not None]
        mins = self.mins is None or tuple(self.mins.shape) == grid
        return columns % SUPER_COLUMNS == 0 and mins and all(tuple(one.shape) == outer for one in found)

    def expanded(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and shifts, each float32 ``[out, groups]``."""
        scales = _times_outer(self.scales, self.outer_scales)
        if self.mins is None or self.outer_mins is None:
            return scales, None
        return scales, -_times_outer(self.mins, self.outer_mins)


@dataclass(frozen=True, slots=True)
class NestedScales(_Tensors):
    """bitsandbytes' double quantization: scales of 256 blocks, counted through the whole matrix, share one.

    ``scale = table[codes[o, g]] * outer[(first + o * stride + g) // 256] + offset``; ``first`` and ``stride`` count
    blocks of the matrix that this one was cut from, less those of the outer scales that it does not hold.
    """

    codes: torch.Tensor  # uint8 [out, groups]
    table: torch.Tensor  # float32 [256]
    outer: torch.Tensor  # float32 [m]
    offset: float
    first: int
    stride: int

    zeros = None

    def fit(self, grid: tuple[int, int], columns: int) -> bool:
        """Whether they are those of a matrix of so many columns with scales ``grid``."""
        last = self.first + (grid[0] - 1) * self.stride + grid[1] - 1
        return self.first >= 0 and len(self.table) == 256 and last < len(self.outer) * NESTED_BLOCKS

    def expanded(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales, float32 ``[out, groups]``, and no shifts."""
        rows, groups = self.codes.shape
        device = self.codes.device
        block = torch.arange(rows, device=device).unsqueeze(1) * self.stride + torch.arange(groups, device=device)
        return self.table[self.codes.int()] * self.outer[(block + self.first) // NESTED_BLOCKS] + self.offset, None


Scales = PlainScales | SuperScales | NestedScales


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix ``[out, in]``. ``order``: int64 ``[in]``, where codes stand in another order of columns than inputs do:
    column j of the codes belongs to input ``order[j]``.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: torch.Tensor  # uint8 [out, row_bytes]: packing.py
    scales: Scales
    order: torch.Tensor | None = None

    def __post_init__(self) -> None:
        (rows, columns), scheme = self.shape, self.scheme
        expected = (rows, row_bytes(columns, scheme.values.bits))
        if tuple(self.codes.shape) != expected or self.codes.dtype is not torch.uint8:
            raise ValueError(f"codes are {self.codes.dtype} {list(self.codes.shape)}, expected uint8 {list(expected)}")
        grid = (-(-rows // scheme.group_rows), scheme.groups(columns))
        first = self.scales.tensors[0]
        if tuple(first.shape) != grid:
            raise ValueError(f"scales are {list(first.shape)}, expected {list(grid)}")
        if not self.scales.fit(grid, columns):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in self.scales.tensors)
            raise ValueError(f"scales of {list(grid)} do not fit together: {shapes}")

    @property
    def nbytes(self) -> int:
        order = 0 if self.order is None else self.order.nbytes
        return self.codes.nbytes + self.scales.nbytes + order

    def rows(self, start: int, stop: int) -> StoredMatrix:
        """Rows ``[start, stop)``, viewing this one's; ``start`` is a multiple of the scheme's ``group_rows``."""
        first, last = start // self.scheme.group_rows, -(-stop // self.scheme.group_rows)
        scales: Scales
        if isinstance(self.scales, NestedScales):
            held = self.scales
            scales = replace(held, codes=held.codes[start:stop], first=held.first + start * held.stride)
        else:
            scales = self.scales.map(lambda tensor: tensor[first:last])
        return replace(self, shape=(stop - start, self.shape[1]), codes=self.codes[start:stop], scales=scales)

    def above(self, below: StoredMatrix) -> StoredMatrix | None:
        """This one's rows and those of ``below`` as one matrix, in memory of its own; None where they are not stored
        alike. Nested scales count through the matrix that they were cut from, so there is no one place for both."""
        mine, theirs = self.scales, below.scales
        if isinstance(mine, NestedScales) or type(mine) is not type(theirs) or self.scheme != below.scheme:
            return None
        if self.shape[1] != below.shape[1] or self.shape[0] % self.scheme.group_rows:
            return None
        if not mine.is_like(theirs) or not _same_order(self.order, below.order):
            return None
        pairs = iter(theirs.tensors)
        return replace(
            self,
            shape=(self.shape[0] + below.shape[0], self.shape[1]),
            codes=torch.cat((self.codes, below.codes)),
            scales=mine.map(lambda tensor: torch.cat((tensor, next(pairs)))),
        )

    def to(self, device: torch.device) -> StoredMatrix:
        """The same on ``device``."""
        scales = self.scales.map(lambda tensor: tensor.to(device))
        order = None if self.order is None else self.order.to(device)
        return replace(self, codes=self.codes.to(device), scales=scales, order=order)


def _same_order(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def decode(stored: StoredMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The matrix as a new dense tensor ``[out, in]``; the one definition of what codes and scales come to."""
    (_, columns), scheme = stored.shape, stored.scheme
    scales, shifts = stored.scales.expanded()
    values = numbers(unpack(stored.codes, columns, scheme.values.bits), scheme)
    if stored.scales.zeros is not None:
        values -= _spread(stored.scales.zeros.float(), stored)
    values *= _spread(scales, stored)
    if scheme.factor != 1.0:
        values *= scheme.factor
    if shifts is not None:
        values += _spread(shifts, stored)
    if scheme.rounded is not None:
        values = values.to(scheme.rounded)
    values = values.to(dtype)
    if stored.order is None:
        return values
    ordered = torch.empty_like(values)
    ordered[:, stored.order] = values
    return ordered


def decode_rows(stored: StoredMatrix, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``indices`` (``[T]`` int64) of ``decode(stored, dtype)``."""
    scales = stored.scales
    if not isinstance(scales, PlainScales | SuperScales) or stored.scheme.group_rows != 1:
        return decode(stored, dtype)[indices]
    taken = replace(
        stored,
        shape=(len(indices), stored.shape[1]),
        codes=stored.codes[indices],
        scales=scales.map(lambda tensor: tensor[indices]),
    )
    return decode(taken, dtype)


def numbers(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What uint8 codes, one a byte, stand for, less the scheme's zero: new, float32."""
    kind = scheme.values
    if kind in TABLES:
        table = torch.tensor(TABLES[kind], dtype=torch.float32, device=codes.device)
        return table[codes.int()]
    if kind is Values.E4M3:
        return codes.contiguous().view(torch.float8_e4m3fn).float()
    values = (codes.view(torch.int8) if kind is Values.INT8 else codes).float()
    return values - scheme.zero if scheme.zero else values


def _times_outer(inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    return outer.float().repeat_interleave(inner.shape[1] // outer.shape[1], 1) * inner.float()


def _spread(grid: torch.Tensor, stored: StoredMatrix) -> torch.Tensor:
    """A value of each group -> one of each weight, ``[out, in]``, or what broadcasts to it."""
    (rows, columns), scheme = stored.shape, stored.scheme
    if scheme.group_rows > 1:
        grid = grid.repeat_interleave(scheme.group_rows, 0)[:rows]
    return grid.repeat_interleave(scheme.group, 1)[:, :columns] if scheme.group else grid
