"""The exact sum of low-rank changes, and its best approximation of a lower rank. The dense matrix is not formed, nor
are the factors laid out side by side: some rows of them at a time are taken to float64.

The sum is ``B W A``, with the factors side by side and the coefficients W. With an orthonormal basis Q of B's columns,
``B W A = Q M``, its left singular vectors are Q times those of M, the eigenvectors of the small ``M M^T``. That, and Q,
come from the products ``B^T B`` and ``A A^T``: squares in float64 lose nothing of factors in float32 or less. So what
is kept of the sum is what a truncated SVD of the dense matrix keeps (Eckart-Young). Of a tall matrix the same is done
to the transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.adapters.delta import LowRank
from loraplex.adapters.merging.eigen import eigh_in_place
from loraplex.adapters.merging.part import Part
from loraplex.adapters.merging.truncation import Truncation, roots_of

#: elements of factors that are taken to float64 at once
_PIECE: Final = 1 << 13
_EPSILON: Final = torch.finfo(torch.float64).eps
#: that the sum's norm may be
_MOST: Final = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class LowRankSum:
    """Of the changes of one site; one or more."""

    parts: Sequence[Part]

    @property
    def rank(self) -> int:
        """Of the factors side by side; the sum's own may be lower."""
        return sum(part.low_rank.rank for part in self.parts)

    def whole(self, dtype: torch.dtype) -> LowRank:
        """All of it. The coefficients go into B, as an adapter's scale does when it is laid out to be served."""
        a = torch.cat([part.low_rank.a.to(dtype) for part in self.parts])
        b, end = a.new_empty(self._b.height, self.rank), 0
        for part in self.parts:
            begin, end = end, end + part.low_rank.rank
            torch.mul(part.low_rank.b, part.coefficient, out=b[:, begin:end])
        return LowRank(a, b, 1.0)

    def truncation(self, dtype: torch.dtype) -> Truncation:
        """Its singular value decomposition, of components in ``dtype``.

        Raises OverflowError: coefficients take it out of the range of float32.
        """
        a, b = self._a, self._b
        is_tall = b.height > a.height
        short, long = (a, b) if is_tall else (b, a)
        found = (_of_few if self.rank < short.height else _of_many)(short, long, self._coefficients)

        def low_rank(rank: int) -> LowRank:
            low_rank = LowRank(torch.empty(rank, a.height, dtype=dtype), torch.empty(b.height, rank, dtype=dtype), 1.0)
            ours, theirs = (low_rank.a.T, low_rank.b) if is_tall else (low_rank.b, low_rank.a.T)
            roots = roots_of(found.values[:rank])
            # the long side has the sizes
            long.times(found.long_turn(found.leading(rank).div_(roots)), theirs)
            if found.short_turn is None:
                ours.copy_(found.leading(rank).mul_(roots))
            else:
                short.times(found.short_turn(found.leading(rank).mul_(roots)), ours)
            return low_rank

        return Truncation(found.values, 0.0, low_rank, lambda other: self._distance(other, found.square))

    def distance(self, other: LowRank) -> float:
        """``||sum - other|| / ||sum||``, from the products of the factors with each other."""
        return self._distance(other, self._square)

    def _distance(self, other: LowRank, square: float) -> float:
        theirs = LowRankSum([Part(other, 1.0)])
        apart = square - 2 * self._product(theirs) + theirs._square
        return 0.0 if square <= 0 else (max(apart, 0.0) / square) ** 0.5

    @property
    def _a(self) -> _Columns:
        """``A^T``."""
        return _Columns([part.low_rank.a.T for part in self.parts])

    @property
    def _b(self) -> _Columns:
        return _Columns([part.low_rank.b for part in self.parts])

    @property
    def _coefficients(self) -> torch.Tensor:
        """Of each component: float64 ``[R]``."""
        each = [part.coefficient for part in self.parts for _ in range(part.low_rank.rank)]
        return torch.tensor(each, dtype=torch.float64)

    def _product(self, other: LowRankSum) -> float:
        """The sum of the products of their values."""
        products = self._a.products(other._a).mul_(self._b.products(other._b))
        return float(self._coefficients @ products @ other._coefficients)

    @property
    def _square(self) -> float:
        """The sum of the squares of its values."""
        products = self._a.squares().mul_(self._b.squares())
        return float(self._coefficients @ products @ self._coefficients)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Matrices of one height side by side, ``[n, R]``, which are never laid out so."""

    parts: Sequence[torch.Tensor]

    @property
    def height(self) -> int:
        return len(self.parts[0])

    @property
    def width(self) -> int:
        return sum(part.shape[1] for part in self.parts)

    def pieces(self, rows: int) -> Iterator[torch.Tensor]:
        """So many rows at a time, float64; all in the same memory."""
        room = torch.empty(rows, self.width, dtype=torch.float64)
        for at in range(0, self.height, rows):
            cut = [part[at : at + rows] for part in self.parts]
            yield room[: len(cut[0])].copy_(cut[0] if len(cut) == 1 else torch.cat(cut, 1))

    def products(self, other: _Columns) -> torch.Tensor:
        """Of all columns with all of ``other``: float64 ``[R, S]``."""
        products, rows = torch.zeros(self.width, other.width, dtype=torch.float64), _rows(self.width + other.width)
        for ours, theirs in zip(self.pieces(rows), other.pieces(rows), strict=True):
            products.addmm_(ours.T, theirs)
        return products

    def squares(self) -> torch.Tensor:
        """The products with each other: float64 ``[R, R]``."""
        squares = torch.zeros(self.width, self.width, dtype=torch.float64)
        for piece in self.pieces(_rows(self.width)):
            squares.addmm_(piece.T, piece)
        return squares

    def times(self, turn: torch.Tensor, out: torch.Tensor) -> None:
        """Write into ``out`` ``[n, r]`` what comes of ``turn``, float64 ``[R, r]``, on the right."""
        rows = _rows(self.width + turn.shape[1])
        for at, piece in enumerate(self.pieces(rows)):
            out[at * rows : (at + 1) * rows].copy_(piece @ turn)


def _rows(width: int) -> int:
    """Of a piece of so many columns."""
    return max(16, _PIECE // width)


@dataclass(frozen=True, slots=True)
class _Components:
    """The sum S as ``Q M``, of what the short columns and the long ones are: ``S = short W long^T``.

    ``values`` ``[k]``: of M, falling. ``vectors`` ``[k, k]``: its left singular vectors, as columns, rising.
    ``square``: of S's norm. ``long_turn``: ``[k, r]``, which it may write over, -> ``[R, r]``, ``M^T x = long
    long_turn(x)``; ``short_turn``: ``Q x = short short_turn(x)``, None where Q is the identity. All float64.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    square: float
    long_turn: Callable[[torch.Tensor], torch.Tensor]
    short_turn: Callable[[torch.Tensor], torch.Tensor] | None

    def leading(self, rank: int) -> torch.Tensor:
        """The vectors of the largest values: ``[k, r]``."""
        return self.vectors[:, -rank:].flip(1)


def _of_few(short: _Columns, long: _Columns, weights: torch.Tensor) -> _Components:
    """Of fewer columns than the short ones have rows: nothing has more than ``[R, R]``."""
    ours, theirs = short.squares(), long.squares()
    # each column as large as what it is multiplied by, so that none is lost beside larger ones that matter less
    scales = (weights.abs() * (theirs.diagonal() / ours.diagonal()).sqrt()).sqrt()
    scales = torch.where(scales.isfinite() & (scales > 0), scales, 1.0)
    others = weights / scales
    ours.mul_(scales).mul_(scales.unsqueeze(1))
    theirs.mul_(others).mul_(others.unsqueeze(1))
    square = _in_range(float((ours * theirs).sum()))
    squares, turn = eigh_in_place(ours)
    is_rounding = squares <= len(squares) * _EPSILON * squares[-1]
    sizes = squares.masked_fill(is_rounding, 0.0).sqrt().unsqueeze(1)
    inverses = torch.where(sizes > 0, 1 / sizes, 0.0)
    torch.mm(turn.T @ theirs, turn, out=theirs)
    found, vectors = eigh_in_place(theirs.mul_(sizes).mul_(sizes.T))
    return _Components(
        found.flip(0).clamp_min(0).sqrt(),
        vectors,
        square,
        lambda x: (turn @ x.mul_(sizes)).mul_(others.unsqueeze(1)),
        lambda x: (turn @ x.mul_(inverses)).mul_(scales.unsqueeze(1)),
    )


def _of_many(short: _Columns, long: _Columns, weights: torch.Tensor) -> _Components:
    """Of as many columns as the short ones have rows, or more: Q is the identity, and M the sum, some columns at a
    time."""
    root = torch.cat(list(short.parts), 1).double().mul_(weights)
    gram = root.new_zeros(short.height, short.height)
    for piece in long.pieces(_rows(long.width)):
        columns = root @ piece.T
        gram.addmm_(columns, columns.T)
    square = _in_range(float(gram.trace()))
    found, vectors = eigh_in_place(gram)
    return _Components(found.flip(0).clamp_min(0).sqrt(), vectors, square, lambda x: root.T @ x, None)


def _in_range(square: float) -> float:
    """``square``. Raises OverflowError: it is that of a norm past the range of float32."""
    if not square <= _MOST**2:
        raise OverflowError("the sum is out of the range of float32")
    return square
