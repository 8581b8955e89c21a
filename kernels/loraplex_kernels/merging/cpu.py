"""Merged matrices on a CPU: what calls the compiled kernels (``cpu_*_kernel.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch

from loraplex_kernels.merging import (
    BITS_PADDING,
    BLOCK_COLUMNS,
    Bits,
    Combined,
    Draws,
    Operand,
    Piece,
    Pieces,
    Place,
    Rule,
    Term,
)
from loraplex_kernels.merging.reference import ReferenceMerging

if TYPE_CHECKING:  # imported when a kernel is needed: a server on a GPU needs no second compiler
    from loraplex_kernels.cpu_ir import Kernel

#: numbers of a Mersenne Twister's state, which it is seeded with a multiplication for each
STATE: Final = 624
_SEEDING: Final = 1812433253
#: one of so many values is expected to lie between bounds that are asked about
_EXPECTED: Final = 16


class CpuMerging:
    """The fast backend: nothing is kept of a block but what is asked for."""

    name = "cpu"

    def __init__(self, *, processor: str = "") -> None:
        """``processor``: an older one to compile for, by LLVM's name."""
        self._processor = processor

    def combined(self, terms: Sequence[Term], rule: Rule) -> Combined:
        from loraplex_kernels.cpu_math import DTYPES
        from loraplex_kernels.merging.cpu_merge_kernel import MergeForm, compile_merge

        held = tuple(_laid_out(term.operand) for term in terms)
        first = held[0]
        for operand, term in zip(held, terms, strict=True):
            _check(operand, first, term, DTYPES)
        form = MergeForm(first.right.dtype, first.left is not None, rule.election, divides=rule.share != 1)
        table = _table(held, terms)
        return _Combined(
            first.shape, compile_merge(form, self._processor), table, int(_float_bits(rule.share)), (held, tuple(terms))
        )

    def gathered(self, operand: Operand, low: float, high: float) -> tuple[int, torch.Tensor]:
        from loraplex_kernels.cpu_math import DTYPES
        from loraplex_kernels.merging.cpu_gather_kernel import compile_gather

        held, term = _laid_out(operand), Term(operand)
        _check(held, held, term, DTYPES)
        table, found = _table([held], [term]), np.empty(2, np.int64)
        gather = compile_gather(held.right.dtype, has_left=held.left is not None, processor=self._processor)
        asked = table.ctypes.data, *held.shape, *_float_bits((low, high)).tolist()
        between = math.prod(held.shape) // _EXPECTED
        while True:
            sizes = torch.empty(between)
            gather(*asked, sizes.data_ptr(), len(sizes), found.ctypes.data)
            below, between = found.tolist()
            if between <= len(sizes):
                return below, sizes[:between]

    def draws(self, seed: int) -> Draws:
        from loraplex_kernels.merging.cpu_draw_kernel import compile_draw, compile_renew

        kernels = compile_draw(self._processor), compile_renew(self._processor)
        return _Draws(*kernels, _seeded(seed), np.array([STATE], np.int64))

    def pieces(self, pieces: Sequence[Piece]) -> Pieces:
        plain = ReferenceMerging().pieces(pieces)
        if any(piece.values.dtype is not torch.float32 for piece in pieces):
            return plain
        from loraplex_kernels.merging.cpu_pieces_kernel import compile_pieces

        ends = ((piece.row + len(piece.values), piece.column + piece.values.shape[1]) for piece in pieces)
        rows, columns = map(max, zip(*ends, strict=True))
        kernel, table = compile_pieces(self._processor), _fields(pieces)
        return _Pieces(plain, tuple(pieces), (rows, columns), kernel, table)


@dataclass(frozen=True, slots=True)
class _Combined:
    """``table``: the terms as the kernel reads them; ``held``: the memory that its addresses point into."""

    shape: tuple[int, int]
    kernel: Kernel
    table: npt.NDArray[np.int64]
    share: int
    held: object

    def fill(self, at: Place, out: torch.Tensor) -> None:
        rows, columns = at
        shape = rows.stop - rows.start, columns.stop - columns.start
        # the kernel writes where it is told: nothing else stands between a wrong tensor and other memory
        if tuple(out.shape) != shape or out.dtype is not torch.float32 or not out.is_contiguous():
            raise ValueError(f"out is {out.dtype} {list(out.shape)}, must be float32 {list(shape)}, contiguous")
        inside = (0 <= each.start <= each.stop <= size for each, size in zip(at, self.shape, strict=True))
        if not all(inside):
            raise ValueError(f"rows {rows} and columns {columns} are not all of a matrix of {self.shape}")
        place = (rows.start, shape[0], columns.start, shape[1])
        if out.numel():
            self.kernel(self.table.ctypes.data, len(self.table), self.shape[1], self.share, *place, out.data_ptr())


@dataclass(frozen=True, slots=True)
class _Draws:
    """``place`` ``[1]``: how many numbers of ``state`` were taken."""

    draw: Kernel
    renew: Kernel
    state: npt.NDArray[np.uint32]
    place: npt.NDArray[np.int64]

    def bits(self, count: int, share: float) -> Bits:
        bits = np.zeros(-(-count // 8) + BITS_PADDING, np.uint8)
        limit = math.ceil(float(np.float32(share)) * 2**24)  # torch.rand's numbers are 24 bits by 2^24
        self.draw(self.state.ctypes.data, self.place.ctypes.data, count, limit, bits.ctypes.data)
        return bits

    def later(self, count: int) -> Draws:
        ours = replace(self, state=self.state.copy(), place=self.place.copy())
        renewals, place = divmod(int(self.place[0]) + count, STATE)
        self.renew(self.state.ctypes.data, renewals)
        self.place[0] = place
        return ours


@dataclass(frozen=True, slots=True)
class _Pieces:
    """``shape``: what is reached. ``table``: the pieces as the kernel reads them, which points into ``pieces``.
    ``plain`` takes blocks that the kernel does not."""

    plain: Pieces
    pieces: tuple[Piece, ...]
    shape: tuple[int, int]
    kernel: Kernel
    table: npt.NDArray[np.int64]

    def add_product(
        self, block: torch.Tensor, to: torch.Tensor, *, share: float = 1.0, of: float = 0.0, factor: float = 1.0
    ) -> torch.Tensor:
        rows, columns = self.shape
        for each, least in ((block, columns), (to, rows)):
            if each.dtype is not torch.float32 or not each.is_contiguous() or len(each) < least:
                raise ValueError(
                    f"a block is {each.dtype} {list(each.shape)}, must be float32, contiguous, of {least} rows"
                )
        if block.shape[1] != to.shape[1] or (of and len(block) != len(to)):
            raise ValueError(f"blocks of {list(block.shape)} and {list(to.shape)}")
        vectors, left = divmod(block.shape[1], BLOCK_COLUMNS)
        if left:
            return self.plain.add_product(block, to, share=share, of=of, factor=factor)
        numbers = _float_bits((share, of, factor)).tolist()
        places = block.data_ptr(), to.data_ptr()
        self.kernel(self.table.ctypes.data, len(self.table), len(to), vectors, *places, *numbers)
        return to


def _fields(pieces: Sequence[Piece]) -> npt.NDArray[np.int64]:
    """As PIECE_FIELDS has them."""
    rows = []
    for piece in pieces:
        values = piece.values
        strides = (stride * values.itemsize for stride in values.stride())
        rows.append((values.data_ptr(), *strides, *values.shape, piece.column, piece.row))
    return np.array(rows, np.int64)


def _laid_out(operand: Operand) -> Operand:
    """With the right one's rows each whole."""
    right = operand.right
    return operand if right.stride(1) == 1 else Operand(operand.left, right.contiguous(), operand.scale)


def _check(operand: Operand, first: Operand, term: Term, dtypes: Sequence[torch.dtype]) -> None:
    """Raises ValueError: not what the contract says."""
    left, right = operand.left, operand.right
    if operand.shape != first.shape or (left is None) is not (first.left is None):
        raise ValueError(f"an operand of {operand.shape} beside one of {first.shape}, or a product beside what is none")
    kinds = {right.dtype, first.right.dtype} | ({left.dtype} if left is not None else set())
    if len(kinds) > 1 or not kinds <= set(dtypes):
        raise ValueError(f"operands are {', '.join(map(str, kinds))}; allowed is one of {', '.join(map(str, dtypes))}")
    if left is not None and left.shape[1] != len(right):
        raise ValueError(f"a product of {list(left.shape)} and {list(right.shape)}")
    num_bytes = -(-math.prod(first.shape) // 8) + BITS_PADDING
    if term.bits is not None and (term.bits.dtype != np.uint8 or term.bits.shape != (num_bytes,)):
        raise ValueError(f"bits are {term.bits.dtype} {term.bits.shape}, must be uint8 {(num_bytes,)}")


def _table(operands: Sequence[Operand], terms: Sequence[Term]) -> npt.NDArray[np.int64]:
    """As TERM_FIELDS has them, a row for each term."""
    floats = _float_bits([(each.scale, term.bound, term.weight) for each, term in zip(operands, terms, strict=True)])
    rows = []
    for operand, term, numbers in zip(operands, terms, floats.tolist(), strict=True):
        left, right = operand.left, operand.right
        lefts = (0, 0, 0) if left is None else (left.data_ptr(), *(stride * left.itemsize for stride in left.stride()))
        rights = right.data_ptr(), right.stride(0) * right.itemsize, len(right)
        rows.append((*lefts, *rights, *numbers, 0 if term.bits is None else term.bits.ctypes.data))
    return np.array(rows, np.int64)


def _float_bits(values: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Of float32; of what is beyond its range those of an infinity."""
    with np.errstate(over="ignore"):
        return np.array(values, np.float32).view(np.uint32)


def _seeded(seed: int) -> npt.NDArray[np.uint32]:
    """As torch seeds its generator: by the lowest 32 bits."""
    state = [seed & 0xFFFFFFFF]
    for place in range(1, STATE):
        state.append((_SEEDING * (state[-1] ^ (state[-1] >> 30)) + place) & 0xFFFFFFFF)
    return np.array(state, np.uint32)
