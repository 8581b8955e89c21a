"""Several matrices of one shape become one: each pruned, weighted, and added or averaged; a block of it at a time.

Contract, for every value of the result, with v_t that of term t, in float32::

    v_t   = scale_t * sum_k left_t[row, k] * right_t[k, column], in the order of k; or scale_t * right_t[row, column]
    v_t   = 0 where |v_t| <= bound_t, or where bits_t has no bit for it; else v_t / share
    sum:       out = sum_t weight_t * v_t
    election:  sign = -1 where sum_t v_t (by size) or sum_t sign(v_t) (by number) is less than 0, else 1
               out  = sign * sum_t weight_t * max(sign * v_t, 0) / max(1, how many of these are not 0)

Terms are taken in their order, and what is not finite comes out as not finite. How a product is rounded is a backend's
own; of the kernels, though not of the reference, it is the same in whichever block a value is asked for.

Source: TIES, arXiv:2306.01708; DARE, arXiv:2311.03099; peft 0.21 utils/merge_utils.py.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

#: columns of a block that a matrix in pieces is multiplied by, or a multiple of them
BLOCK_COLUMNS: Final = 16
#: bytes behind the last bit
BITS_PADDING: Final = 4
#: of each factor's, that are there at once while single values are looked up
_FACTOR_ELEMENTS: Final = 1 << 16

Bits = npt.NDArray[np.uint8]
"""A bit for each value, row after row, the lowest of a byte first; BITS_PADDING more bytes follow."""

Place = tuple[slice, slice]
"""Rows and columns of a block; both have their start and stop."""


@dataclass(frozen=True, slots=True)
class Operand:
    """``scale * left right``, left ``[rows, r]``, right ``[r, columns]``; or, where left is None, ``scale * right``.
    Tensors are on the CPU, float32, bfloat16 or float16, both of one dtype."""

    left: torch.Tensor | None
    right: torch.Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.right if self.left is None else self.left), self.right.shape[1]

    @property
    def transpose(self) -> Operand:
        if self.left is None:
            return Operand(None, self.right.T, self.scale)
        return Operand(self.right.T, self.left.T, self.scale)

    def at(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Its values there, about. rows, columns: ``[n]``."""
        if self.left is None:
            return self.right[rows, columns].float().mul_(self.scale)
        right, some = self.right.T.contiguous(), max(_FACTOR_ELEMENTS // max(len(self.right), 1), 1)
        found = [
            self.left.index_select(0, ours).float().mul_(right.index_select(0, theirs)).sum(1)
            for ours, theirs in zip(torch.split(rows, some), torch.split(columns, some), strict=True)
        ]
        return torch.cat(found).mul_(self.scale)


@dataclass(frozen=True, slots=True)
class Term:
    """One of the matrices. ``bound`` below 0 prunes nothing, nor does ``bits`` None."""

    operand: Operand
    weight: float = 1.0
    bound: float = -1.0
    bits: Bits | None = None


class Election(enum.Enum):
    """Whose values count."""

    #: everyone's: the sum
    NONE = enum.auto()
    #: those with the sign of the sum of all
    BY_SIZE = enum.auto()
    #: those with the sign that more have
    BY_NUMBER = enum.auto()


@dataclass(frozen=True, slots=True)
class Rule:
    """How terms become one. ``share``: of the values that pruning keeps, by which they are divided."""

    election: Election = Election.NONE
    share: float = 1.0


class Combined(Protocol):
    """One matrix of several, made ready by one backend."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def fill(self, at: Place, out: torch.Tensor) -> None:
        """Write its values there into ``out``: float32, contiguous and of that shape."""
        ...


class Draws(Protocol):
    """Uniform random numbers of one seed, those of ``torch.rand`` on a CPU, one after another."""

    def bits(self, count: int, share: float) -> Bits:
        """Whether each of the next ``count`` is below ``share``, in float32."""
        ...

    def later(self, count: int) -> Draws:
        """Those from here on, for whoever draws them later; these go on behind the next ``count``."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Of a matrix M ``[n, m]``: its values ``[rows, columns]``, with any strides, from ``row`` and ``column`` on."""

    values: torch.Tensor
    row: int = 0
    column: int = 0


class Pieces(Protocol):
    """A matrix M ``[n, m]`` that is the sum of pieces."""

    def add_product(
        self, block: torch.Tensor, to: torch.Tensor, *, share: float = 1.0, of: float = 0.0, factor: float = 1.0
    ) -> torch.Tensor:
        """``to = share * to + of * block + factor * (M @ block)``, and returns it.

        ``block`` is ``[m, b]``, ``to`` ``[n, b]``, in memory of its own; both are contiguous and of the pieces' dtype.
        ``of`` is 0 where they differ in length; with a share of 0 nothing of ``to`` is left. Some are quick only where
        b is a multiple of ``BLOCK_COLUMNS``.
        """
        ...


class MergingBackend(Protocol):
    """Several threads may use it at once, each a ``Combined`` or ``Draws`` of its own."""

    name: str

    def combined(self, terms: Sequence[Term], rule: Rule) -> Combined:
        """One term or more, of one shape, their operands of one dtype."""
        ...

    def gathered(self, operand: Operand, low: float, high: float) -> tuple[int, torch.Tensor]:
        """How many values of an operand are smaller than ``low`` in size, or no numbers; and the sizes of those from
        ``low`` to ``high``, ``[n]`` float32. They are those that ``combined`` has, to the bit."""
        ...

    def draws(self, seed: int) -> Draws: ...

    def pieces(self, pieces: Sequence[Piece]) -> Pieces:
        """One or more, of one dtype, float32 or float64. What is written there later counts."""
        ...


def packed(chosen: npt.NDArray[np.bool_]) -> Bits:
    """A bit for each."""
    return np.concatenate((np.packbits(chosen.reshape(-1), bitorder="little"), np.zeros(BITS_PADDING, np.uint8)))
