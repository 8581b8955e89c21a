"""How the CPU backend holds a slot: by itself, its factors in the order the kernel reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from loraplex_kernels.lanes import LANES, VECTOR_BYTES
from loraplex_kernels.lora import SlotDelta
from loraplex_kernels.lora.cpu_vectors import pack_vectors

#: rows that share one pass over a slot's factors
BLOCK_ROWS = 8


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a slot: ``y[:, column : column+size] += h[row : row+rank].T @ B.T``."""

    row: int  # of A x
    rank: int
    column: int  # of y
    size: int
    b: torch.Tensor  # the layout of cpu_kernels.py

    def plain(self) -> torch.Tensor:
        """B transposed, ``[r, size]``."""
        blocks = self.b.transpose(-1, -2) if self.b.dtype is torch.bfloat16 else self.b  # [n, r/2, 2, 16]
        return blocks.permute(1, 2, 0, 3).reshape(-1, blocks.shape[0] * LANES)[: self.rank, : self.size]


class SlotFactors:
    """One slot's share of a table, in its own memory: the Packed of this backend, and what its slots hold.

    Never changed once made. Ranks are rounded up to even, widths to a vector; all else is true size.
    """

    def __init__(self, delta: SlotDelta, sizes: tuple[int, ...]) -> None:
        """``delta`` fits a table of these part sizes."""
        present = [(i, part.factors) for i, part in enumerate(delta.parts) if part is not None and part.factors]
        rows = [_padded_a(factors.a) for _, factors in present]
        blocks = [_blocked_b(factors.b) for _, factors in present]
        self.parts: list[Part] = []
        self.a = torch.empty(0, 0)  # [sum of even ranks, in rounded up]
        self.nbytes = 0
        if present:
            # one piece of memory, in the order it is read: what the kernel asks for ahead is then what it needs next
            memory = torch.cat([tensor.reshape(-1) for tensor in (*rows, *blocks)])
            num_rows = sum(row.shape[0] for row in rows)
            self.a = memory[: num_rows * rows[0].shape[1]].view(num_rows, -1)
            self.nbytes = memory.nbytes
        row, place = 0, self.a.numel()
        for (index, factors), padded, block in zip(present, rows, blocks, strict=True):
            b = memory[place : place + block.numel()].view(block.shape)
            self.parts.append(Part(row, factors.a.shape[0], sum(sizes[:index]), sizes[index], b))
            row, place = row + padded.shape[0], place + block.numel()
        fields = [(p.row, (p.rank + 1) // 2, p.b.data_ptr(), p.column, p.size) for p in self.parts]
        self._fields = np.array(fields, dtype=np.int64)
        #: what the kernel reads of it, behind its rows: address of A, rows of A, address of the parts' fields, parts
        self.tile = (self.a.data_ptr(), self.a.shape[0], self._fields.ctypes.data, len(fields))
        self.vectors = pack_vectors(delta, sizes)
        self.nbytes += self.vectors.nbytes

    @property
    def multiplications_per_row(self) -> int:
        """What one row of x costs."""
        return self.a.numel() + sum(part.b.numel() for part in self.parts)

    def add_(self, y: torch.Tensor, h: torch.Tensor) -> None:
        """``y[n, width] += `` the expansion of ``h`` ``[rows of A, n]``, by library calls."""
        for part in self.parts:
            y.narrow(1, part.column, part.size).addmm_(h[part.row : part.row + part.rank].t(), part.plain())


def _padded_a(a: torch.Tensor) -> torch.Tensor:
    rank, width = a.shape
    return functional.pad(a, (0, -width % (VECTOR_BYTES // a.itemsize), 0, rank % 2))


def _blocked_b(b: torch.Tensor) -> torch.Tensor:
    """``[out, r]`` -> ``[out/16, r/2, 2, 16]``, for bfloat16 with the last two swapped."""
    size, rank = b.shape
    blocks = functional.pad(b, (0, rank % 2, 0, -size % LANES)).view(-1, LANES, (rank + 1) // 2, 2)  # [n, 16, r/2, 2]
    order = (0, 2, 1, 3) if b.dtype is torch.bfloat16 else (0, 2, 3, 1)
    return blocks.permute(order).contiguous()
