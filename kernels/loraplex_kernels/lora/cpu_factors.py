"""How the CPU backend stores factors: true ranks for each slot, and a stack that copies the slots of the decodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loraplex_kernels.lora import Factors
from loraplex_kernels.lora.rows import RowMap

# A stacked product covers a multiple of this many rows: the matrix library compiles a kernel for each new shape
# (0.5 ms), and its cache is finite.
ROW_MULTIPLE = 16

# Parts join one batched product up to this many chunks: a call costs 13 us, a further small matrix of a batch under 1.
MAX_CHUNKS = 16


@dataclass(frozen=True, slots=True)
class Columns:
    """Neighbouring parts whose expansions run as one batched product over equal chunks of y's columns.

    Sizes 576, 192, 192 are five chunks of 192: three of the first part, one of each other.
    """

    parts: tuple[int, ...]
    first: int  # column of y
    size: int  # columns of a chunk
    chunk_parts: torch.Tensor | None  # [chunks] int64, index into parts; None when a chunk is a part

    def chunks(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """B transposed ``[r, part size]`` for each part -> ``[chunks, r, size]``."""
        return torch.cat([part.reshape(part.shape[0], -1, self.size).transpose(0, 1) for part in parts])

    def add_(self, y: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> None:
        """``y[n, width] += h @ b``: h is ``[parts, n, r]``, b is ``[chunks, r, size]``."""
        chunks = b.shape[0]
        if chunks == 1:
            y.narrow(1, self.first, self.size).addmm_(h[0], b[0])
            return
        if self.chunk_parts is not None:
            h = h.index_select(0, self.chunk_parts)
        columns = y.narrow(1, self.first, chunks * self.size)
        columns.view(y.shape[0], chunks, self.size).transpose(0, 1).baddbmm_(h, b)


def adjacent(sizes: tuple[int, ...], keys: tuple[int, ...]) -> tuple[Columns, ...]:
    """Runs of neighbouring parts with equal keys that cut into few chunks; parts whose key is 0 are left out."""
    runs: list[list[int]] = []
    for part, key in enumerate(keys):
        run = runs[-1] if runs else []
        joined = [*run, part]
        together = bool(run) and run[-1] == part - 1 and keys[run[-1]] == key
        if key and together and sum(sizes[p] for p in joined) <= MAX_CHUNKS * math.gcd(*(sizes[p] for p in joined)):
            runs[-1] = joined
        elif key:
            runs.append([part])
    return tuple(_columns(run, sizes) for run in runs)


def _columns(run: list[int], sizes: tuple[int, ...]) -> Columns:
    size = math.gcd(*(sizes[part] for part in run))
    chunk_parts = [index for index, part in enumerate(run) for _ in range(sizes[part] // size)]
    one_each = len(chunk_parts) == len(run)
    return Columns(tuple(run), sum(sizes[: run[0]]), size, None if one_each else torch.tensor(chunk_parts))


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Parts of equal rank of one slot, expanded together."""

    columns: Columns
    rows: slice  # of A x
    rank: int
    b: torch.Tensor  # [chunks, r, size]


class SlotFactors:
    """One slot's factors in true ranks: A of all parts in one tensor, B transposed, parts of equal rank together."""

    def __init__(self, parts: tuple[Factors | None, ...], sizes: tuple[int, ...]) -> None:
        present = [part for part in parts if part is not None]
        self.ranks = tuple(0 if part is None else part.a.shape[0] for part in parts)
        self.rank = max(self.ranks)
        self.a = torch.cat([part.a for part in present])  # [sum of ranks, in]
        self.nbytes = sum(part.a.nbytes + part.b.nbytes for part in present)
        self._sizes = sizes
        self._runs: list[SlotRun] = []
        row = 0
        for columns in adjacent(sizes, self.ranks):
            rank = self.ranks[columns.parts[0]]
            b = columns.chunks([part.b.t() for index in columns.parts if (part := parts[index]) is not None])
            rows = slice(row, row + len(columns.parts) * rank)
            self._runs.append(SlotRun(columns, rows, rank, b))
            row = rows.stop

    def add_(self, y: torch.Tensor, h: torch.Tensor) -> None:
        """``y[n, width] += `` the expansion of ``h`` ``[sum of ranks, n]``."""
        for run in self._runs:
            h_run = h[run.rows].view(len(run.columns.parts), run.rank, -1).transpose(1, 2)  # [parts, n, r]
            run.columns.add_(y, h_run, run.b)

    def b_transposed(self, part: int) -> torch.Tensor:
        """B of a part this slot has, ``[r, part size]``."""
        for run in self._runs:
            if part in run.columns.parts:
                before = run.columns.parts[: run.columns.parts.index(part)]
                first = sum(self._sizes[p] for p in before) // run.columns.size
                chunks = run.b[first : first + self._sizes[part] // run.columns.size]
                return chunks.transpose(0, 1).reshape(run.rank, -1)
        raise KeyError(part)


@dataclass(frozen=True, slots=True)
class StackRange:
    """Rows of a stack that hold some slots, and where each of them lies within."""

    a: torch.Tensor  # [n * parts, in], parts innermost
    b: tuple[torch.Tensor, ...]  # [chunks, n, size] for each of the stack's columns
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
        self._sizes = sizes
        self.columns = adjacent(sizes, (1,) * len(sizes))
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
            b=tuple(b[:, first : first + num_rows] for b in self._b),
            rows=tuple((start - first, stop - first) for start, stop in rows),
            num_rows=num_rows,
        )

    def _resize(self, capacity: int) -> None:
        old_a, old_b, kept = self._a, self._b, self._capacity
        self._capacity = capacity
        self._a = torch.zeros(capacity, self._parts, self._in_features, dtype=self._dtype)
        widths = [sum(self._sizes[part] for part in columns.parts) for columns in self.columns]
        self._b = [
            torch.zeros(width // columns.size, capacity, columns.size, dtype=self._dtype)
            for columns, width in zip(self.columns, widths, strict=True)
        ]
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
        for columns, b in zip(self.columns, self._b, strict=True):
            chunk = 0
            for part in columns.parts:
                count, rank = self._sizes[part] // columns.size, factors.ranks[part]
                if rank:
                    b[chunk : chunk + count, start : start + rank] = columns.chunks([factors.b_transposed(part)])
                chunk += count
