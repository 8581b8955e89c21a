"""The left singular vectors of a wide matrix D: all of them, or only those of its largest singular values.

All are the eigenvectors of ``D D^T``, in float64, in which squares lose nothing of a float32 matrix. A few come at a
fraction of that by subspace iteration: a block of some more columns is multiplied again and again by a polynomial of
``D D^T`` that is small where the unwanted eigenvalues lie and grows fast above (Chebyshev's); in float32, or, where the
wanted values fall by orders of magnitude, in float64. What comes of it is believed only where its residuals, taken in
float64, prove that ``U U^T D`` is as near to the truth as a float32 decomposition comes; how near neighbouring singular
values are counts in that. Elsewhere all are found after all.

Source: Zhou, Saad, Tiago, Chelikowsky, J. Comput. Phys. 219 (2006), algorithm 4.2; the bound is Davis and Kahan's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.adapters.merging.eigen import eigh_in_place
from loraplex.adapters.merging.gram import Gram
from loraplex.adapters.merging.matrix import BLOCK_ELEMENTS, Matrix, block, blocks

#: a block of more than this part of all vectors costs as much as all
_LARGEST_PART: Final = 1 / 7
#: of ``U U^T D``, relative to D. LAPACK's float32 decomposition errs by 1e-6 to 6e-6 on matrices of 576 x 1536
_TOLERANCE: Final = 2e-6
#: what is iterated in, the quicker first -> norms of D with which its squares stay within it
_NORMS: Final = {torch.float32: (1e-12, 1e18), torch.float64: (1e-150, 1e150)}
#: the part of the largest square below which rounding of the others says more of a wanted one than itself
_LOST: Final = {torch.float32: 1e-5, torch.float64: 1e-13}
#: a filter's degree, at most; the logarithm of how much it may enlarge a column
_DEGREE, _GROWTH = 16, math.log(1e25)
#: logarithms of how much more it may enlarge the first column than the last wanted one, whose own part is lost else
_SPREAD: Final = {torch.float32: math.log(1e7), torch.float64: math.log(1e14)}
#: times the tolerance from which exact products with ``D D^T``, which the proof takes anyway, lead there soon; and how
#: many proofs are tried
_NEAR, _PROOFS = 20, 3
#: elements of a block that is taken to float64
_PROOF_ELEMENTS: Final = BLOCK_ELEMENTS // 2
#: columns to multiply before it is given up, relative to the matrix's: then all eigenvectors had cost less
_PATIENCE: Final = 3


@dataclass(frozen=True, slots=True)
class LeftVectors:
    """``values`` ``[k]``: singular values, falling. ``vectors`` ``[n, k]``. ``rest``: the sum of the squares of all
    other singular values. ``coordinates``: r -> ``U_r^T D`` ``[r, m]``, float32. All else is float64."""

    values: torch.Tensor
    vectors: torch.Tensor
    rest: float
    coordinates: Callable[[int], torch.Tensor]


def left_vectors(wide: Matrix, count: int | None = None) -> LeftVectors:
    """Those of ``wide`` ``[n, m]``: of the largest ``count`` singular values, or of more; None: of all n.

    Raises OverflowError: a value of it is not finite.
    """
    if count is not None and finds_leading(wide.shape[0], count):
        for dtype in _NORMS:
            found = _leading(wide, count, dtype)
            if found is not None:
                return found
    return _all(wide)


def finds_leading(size: int, count: int) -> bool:
    """Whether the first ``count`` of ``size`` are worth looking for by themselves."""
    return width_of(count) <= _LARGEST_PART * size


def width_of(count: int) -> int:
    """Of the block that holds the first ``count``: the farther its last eigenvalue is from the last wanted one, the
    faster all come."""
    return count + 8 + count // 2


def _leading(wide: Matrix, count: int, dtype: torch.dtype) -> LeftVectors | None:
    """The first ``count``, if iteration in ``dtype`` finds them."""
    gram = Gram.of(wide, dtype)
    norm, (least, most) = gram.norm, _NORMS[dtype]
    if not least < norm < most:
        return None
    basis = _filtered(gram, count, _TOLERANCE * norm)
    del gram
    for _ in range(_PROOFS):
        if basis is not None:
            found, basis = _proven(wide, basis, count, _TOLERANCE * norm)
            if found is not None:
                return found
    return None


def _all(wide: Matrix) -> LeftVectors:
    gram = Gram.of(wide, torch.float64)
    if not math.isfinite(gram.norm):
        raise OverflowError("a value is not finite")
    whole = gram.whole()
    del gram
    squares, rising = eigh_in_place(whole)
    del whole
    vectors = rising.flip(1)
    del rising

    def coordinates(rank: int) -> torch.Tensor:
        chosen, found = vectors[:, :rank].float().T, torch.empty(rank, wide.shape[1])
        for at in blocks(wide):
            found[:, at.columns] = chosen @ block(wide, at)
        return found

    return LeftVectors(squares.flip(0).clamp_min(0).sqrt(), vectors, 0.0, coordinates)


def _filtered(gram: Gram, count: int, tolerance: float) -> torch.Tensor | None:
    """An orthonormal block that holds the first ``count`` eigenvectors, or nearly so, as far as the dtype can tell;
    None: not soon."""
    size, width, dtype = gram.size, width_of(count), gram.dtype
    left = _PATIENCE * size // width  # products with the block
    block = gram @ torch.randn(size, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    block = _orthonormal(gram @ _orthonormal(block))
    before = math.inf
    while True:
        squares, block, residuals = _ritz(block, gram @ block)
        error, cut = _error(squares, residuals, count), float(squares[-1])
        if error <= tolerance or before / 2 < error < _NEAR * tolerance:
            return block
        before = error
        if cut <= 0 or float(squares[count - 1]) < _LOST[dtype] * float(squares[0]):
            return None
        # a polynomial of degree d enlarges what lies at x times the cut by about exp(d * acosh(2 x - 1))
        most, least = (math.acosh(max(2 * float(squares[at]) / cut - 1, 1.0)) for at in (0, count - 1))
        missing = math.log(3 * error / tolerance)
        if missing > least * left:
            return None
        allowed = min(_DEGREE, _GROWTH / most, _SPREAD[dtype] / max(most - least, 1e-9))
        degree = max(1, int(min(math.ceil(missing / least), allowed)))
        block = _orthonormal(_chebyshev(gram, block, cut, degree))
        left -= degree + 1


def _chebyshev(gram: Gram, block: torch.Tensor, cut: float, degree: int) -> torch.Tensor:
    """``T_degree(2 / cut * gram - 1) block``: eigenvalues of 0 to ``cut`` stay within 1, larger ones grow."""
    before, now = block, (gram @ block).mul_(2 / cut).sub_(block)
    for _ in range(degree - 1):
        before, now = now, (gram @ now).mul_(4 / cut).sub_(now, alpha=2).sub_(before)
    return now


def _proven(
    wide: Matrix, basis: torch.Tensor, count: int, tolerance: float
) -> tuple[LeftVectors | None, torch.Tensor | None]:
    """The first ``count`` within ``basis``, where they are within the tolerance; where they nearly are a better
    basis."""
    basis = _orthonormal(basis.double())
    product = basis.new_zeros(basis.shape[::-1])  # [b, n]: with these few on the left both products take half the time
    rows = torch.empty(basis.shape[1], wide.shape[1])

    def square_of(columns: torch.Tensor, into: torch.Tensor) -> float:
        ours = basis.T @ columns
        product.addmm_(ours, columns.T)
        into.copy_(ours)
        return float(torch.linalg.vector_norm(columns)) ** 2

    whole = sum(square_of(block(wide, at).double(), rows[:, at.columns]) for at in blocks(wide, _PROOF_ELEMENTS))
    squares, vectors, residuals = _ritz(basis, product.T)
    error = _error(squares, residuals, count)
    if error > tolerance:
        return None, product.T if error < _NEAR * tolerance else None
    squares, vectors = squares[:count].clamp_min(0), vectors[:, :count]
    turn = (basis.T @ vectors).float()

    def coordinates(rank: int) -> torch.Tensor:
        return turn[:, :rank].T @ rows

    return LeftVectors(squares.sqrt(), vectors, max(whole - float(squares.sum()), 0.0), coordinates), None


def _ritz(block: torch.Tensor, product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best eigenvectors within ``block``, of which ``product`` is the matrix's: eigenvalues ``[b]`` float64,
    falling; vectors, as the block; the norm of each one's residual ``[b]`` float64."""
    squares, turn = torch.linalg.eigh((block.T @ product).double())
    squares, turn = squares.flip(0), turn.flip(1).to(block.dtype)
    vectors = block @ turn
    residuals = (product @ turn).addcmul_(vectors, squares.to(block.dtype), value=-1)
    scale = float(squares[0]) or 1.0  # so that their squares stay within the block's range
    return squares, vectors, torch.linalg.vector_norm(residuals.div_(scale), dim=0).double().mul_(scale)


def _error(squares: torch.Tensor, residuals: torch.Tensor, count: int) -> float:
    """How far ``U U^T D`` of the first ``count`` may be from the truth, in the Frobenius norm.

    A wanted vector i leans by an angle towards what is outside the block, whose eigenvalues are at most about the
    block's last; and through that towards an unwanted vector j of the block, the more, the nearer their eigenvalues
    are. An angle between i and j moves the product by it times ``sqrt(s_i^2 + s_j^2)``.
    """
    wanted, others = squares[:count, None], squares[None, count:]  # [r, 1], [1, e]
    outside = _angle(residuals[:count, None], wanted - squares[-1])
    inside = _angle(outside * residuals[None, count:], wanted - others)
    moved = outside.square() * (wanted + squares[-1]) + (inside.square() * (wanted + others)).sum(1, keepdim=True)
    return math.sqrt(max(float(moved.sum()), 0.0))


def _angle(residual: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    return (residual / gap.clamp_min(torch.finfo(gap.dtype).tiny)).clamp_max(1)


def _orthonormal(block: torch.Tensor) -> torch.Tensor:
    q: torch.Tensor = torch.linalg.qr(block).Q
    return q
