"""How the CPU backend stores factors: true ranks for each slot, and a stack that copies the slots of the decodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loraplex_kernels.lora import Factors
from loraplex_kernels.lora.rows import RowMap

# A stacked product covers a multiple of this many rows: the matrix library compiles a kernel for each new shape
# (0.5 ms), and its cache is finite.
ROW_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Columns:
    """Adjacent parts of one size, whose expansions run as one batched product: y columns from ``first`` on."""

    part: int
    count: int
    size: int
    first: int


@dataclass(frozen=True, slots=True)
class Expansion:
    """``y[:, columns] += h @ b`` with b ``[count, r, size]``."""

    columns: Columns
    b: torch.Tensor

    def add_(self, y: torch.Tensor, h: torch.Tensor) -> None:
        """``y`` is ``[n, width]``, ``h`` is ``[count, n, r]``."""
        columns = self.columns
        if columns.count == 1:
            y.narrow(1, columns.first, columns.size).addmm_(h[0], self.b[0])
        else:
            part = y.narrow(1, columns.first, columns.count * columns.size)
            part.view(y.shape[0], columns.count, columns.size).transpose(0, 1).baddbmm_(h, self.b)


def adjacent(sizes: tuple[int, ...], keys: tuple[int, ...]) -> tuple[Columns, ...]:
    """Runs of neighbouring parts that agree in size and key; parts whose key is 0 are left out."""
    runs: list[Columns] = []
    first = 0
    for part, (size, key) in enumerate(zip(sizes, keys, strict=True)):
        if key:
            last = runs[-1] if runs else None
            joins = last is not None and last.part + last.count == part
            if last is not None and joins and (last.size, keys[last.part]) == (size, key):
                runs[-1] = Columns(last.part, last.count + 1, size, last.first)
            else:
                runs.append(Columns(part, 1, size, first))
        first += size
    return tuple(runs)


class SlotFactors:
    """One slot's factors in true ranks: A of all parts in one tensor, B transposed, equal neighbours together."""

    def __init__(self, parts: tuple[Factors | None, ...], sizes: tuple[int, ...]) -> None:
        present = [part for part in parts if part is not None]
        self.ranks = tuple(0 if part is None else part.a.shape[0] for part in parts)
        self.rank = max(self.ranks)
        self.a = torch.cat([part.a for part in present])  # [sum of ranks, in]
        self.expansions: list[tuple[slice, int, Expansion]] = []  # rows of A x, rank, what they are multiplied by
        row = 0
        for columns in adjacent(sizes, self.ranks):
            rank = self.ranks[columns.part]
            run = parts[columns.part : columns.part + columns.count]
            b = torch.stack([part.b.t() for part in run if part is not None]).contiguous()  # [count, r, size]
            self.expansions.append((slice(row, row + columns.count * rank), rank, Expansion(columns, b)))
            row += columns.count * rank
        self.nbytes = self.a.nbytes + sum(expansion.b.nbytes for _, _, expansion in self.expansions)

    def add_(self, y: torch.Tensor, h: torch.Tensor) -> None:
        """``y[n, width] += `` the expansion of ``h`` ``[sum of ranks, n]``."""
        for rows, rank, expansion in self.expansions:
            expansion.add_(y, h[rows].view(expansion.columns.count, rank, -1).transpose(1, 2))


@dataclass(frozen=True, slots=True)
class StackRange:
    """Rows of a stack that hold some slots, and where each of them lies within."""

    a: torch.Tensor  # [n * parts, in], parts innermost
    expansions: tuple[Expansion, ...]
    rows: tuple[tuple[int, int], ...]  # per slot
    num_rows: int


class Stack:
    """Copies of the slots that decode together, in neighbouring rows padded to each slot's largest rank.

    Every row that no slot has written is zero, so that a product over a range never meets anything but finite values.
    """

    def __init__(self, in_features: int, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
        self._in_features = in_features
        self._dtype = dtype
        self._parts = len(sizes)
        self._columns = adjacent(sizes, (1,) * len(sizes))
        self._map = RowMap()
        self._capacity = 0
        self._a = torch.empty(0)
        self._b: list[torch.Tensor] = []
        self._resize(0)

    def forget(self, slot: int) -> None:
        """``slot`` was rewritten or cleared: its copy is stale."""
        self._map.forget(slot)

    def place(self, slots: Mapping[int, SlotFactors]) -> None:
        """Have all ``slots`` in the stack, near each other."""
        new = self._map.place({slot: factors.rank for slot, factors in slots.items()})
        if not new:
            return
        end = max(self._map.rows(slot)[1] for slot in slots) + ROW_MULTIPLE
        if end > self._capacity:
            self._resize(max(end, 2 * self._capacity))
        for slot in new:
            self._copy(slots[slot], *self._map.rows(slot))

    def range_of(self, slots: tuple[int, ...]) -> StackRange:
        """The rows over placed ``slots``."""
        rows = [self._map.rows(slot) for slot in slots]
        first = min(start for start, _ in rows)
        last = max(stop for _, stop in rows)
        num_rows = -(-(last - first) // ROW_MULTIPLE) * ROW_MULTIPLE
        return StackRange(
            a=self._a[first : first + num_rows].view(-1, self._in_features),
            expansions=tuple(
                Expansion(columns, b[:, first : first + num_rows])
                for columns, b in zip(self._columns, self._b, strict=True)
            ),
            rows=tuple((start - first, stop - first) for start, stop in rows),
            num_rows=num_rows,
        )

    def _resize(self, capacity: int) -> None:
        old_a, old_b, kept = self._a, self._b, self._capacity
        self._capacity = capacity
        self._a = torch.zeros(capacity, self._parts, self._in_features, dtype=self._dtype)
        self._b = [torch.zeros(c.count, capacity, c.size, dtype=self._dtype) for c in self._columns]
        if kept:
            self._a[:kept] = old_a
            for new, old in zip(self._b, old_b, strict=True):
                new[:, :kept] = old

    def _copy(self, factors: SlotFactors, start: int, stop: int) -> None:
        a = self._a[start:stop]  # [r, parts, in]
        if min(factors.ranks) < factors.rank:  # what another slot left in the padding must not stay
            a.zero_()
            for b in self._b:
                b[:, start:stop].zero_()
        row = 0
        for part, rank in enumerate(factors.ranks):
            a[:rank, part] = factors.a[row : row + rank]
            row += rank
        for _, rank, expansion in factors.expansions:
            for offset in range(expansion.columns.count):
                part = expansion.columns.part + offset
                for columns, b in zip(self._columns, self._b, strict=True):
                    if columns.part <= part < columns.part + columns.count:
                        b[part - columns.part, start : start + rank] = expansion.b[offset]
