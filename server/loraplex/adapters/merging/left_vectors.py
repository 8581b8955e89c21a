"""The left singular vectors of a wide matrix D: all of them, or only those of its largest singular values.

All are the eigenvectors of ``D D^T``, in float64, in which squares lose nothing of a float32 matrix. A few come at a
fraction of that by subspace iteration: a block of some more columns is multiplied again and again by a polynomial of
``D D^T`` that is small where the unwanted eigenvalues lie and grows fast above (Chebyshev's); in float32, or, where the
wanted values fall by orders of magnitude, in float64. What comes of it is believed only where its residuals, from
products with D itself, prove that ``U U^T D`` is as near to the truth as a float32 decomposition comes; how near
neighbouring singular values are counts in that, and where float32 cannot tell them apart these products are float64's.
Elsewhere all are found after all.

Source: Zhou, Saad, Tiago, Chelikowsky, J. Comput. Phys. 219 (2006), algorithm 4.2, with its vectors taken out once they
are found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.adapters.merging.eigen import eigh_in_place
from loraplex.adapters.merging.gram import Gram
from loraplex.adapters.merging.matrix import BLOCK_ELEMENTS, Matrix, block, blocks, square
from loraplex.adapters.merging.ritz import Floats, RitzVectors, confusion, exact_ritz, ritz, squared_errors
from loraplex_kernels.merging import MergingBackend

#: a block of more than this part of all vectors costs as much as all
_LARGEST_PART: Final = 1 / 7
#: of ``U U^T D``, relative to D. LAPACK's float32 decomposition errs by 1e-6 to 6e-6 on matrices of 576 x 1536
_TOLERANCE: Final = 2e-6
#: what is iterated in -> norms of D with which its squares stay within it
_NORMS: Final = {torch.float32: (1e-12, 1e18), torch.float64: (1e-150, 1e150)}
#: the part of the largest square below which rounding of the others says more of a wanted one than itself
_LOST: Final = {torch.float32: 1e-5, torch.float64: 1e-13}
#: a filter's degree, at most; the logarithm of how much it may enlarge a column
_DEGREE, _GROWTH = 16, math.log(1e25)
#: logarithms of how much more it may enlarge the first column than the last wanted one, whose own part is lost else
_SPREAD: Final = {torch.float32: math.log(1e7), torch.float64: math.log(1e14)}
#: roundings of its eigenvalue that a residual may be of which no more is to be found out
_ROUNDINGS: Final = 16
#: times the tolerance from which exact products with ``D D^T``, which the proof takes anyway, lead there soon; and how
#: many proofs are tried
_NEAR, _PROOFS = 20, 3
#: of a block that is multiplied in a proof
_PROOF_BYTES: Final = BLOCK_ELEMENTS * torch.float32.itemsize
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


def left_vectors(
    wide: Matrix, count: int | None, backend: MergingBackend, on_double: Callable[[], None] = lambda: None
) -> LeftVectors:
    """Those of ``wide`` ``[n, m]``: of the largest ``count`` singular values, or of more; None: of all n. ``backend``
    multiplies. ``on_double`` is called before it all begins again in float64, which takes more memory.

    Raises OverflowError: a value of it is not finite.
    """
    if count is not None and finds_leading(wide.shape[0], count):
        if (found := _leading(wide, count, torch.float32, backend)) is not None:
            return found
        on_double()
        if (found := _leading(wide, count, torch.float64, backend)) is not None:
            return found
    return _all(wide, backend)


def finds_leading(size: int, count: int) -> bool:
    """Whether the first ``count`` of ``size`` are worth looking for by themselves."""
    return width_of(count) <= _LARGEST_PART * size


def width_of(count: int) -> int:
    """Of the block that holds the first ``count``: the farther its last eigenvalue is from the last wanted one, the
    faster all come."""
    return count + 8 + count // 2


def _leading(wide: Matrix, count: int, dtype: torch.dtype, backend: MergingBackend) -> LeftVectors | None:
    """The first ``count``, if iteration in ``dtype`` finds them."""
    gram = Gram.of(wide, dtype, backend)
    norm, (least, most) = gram.norm, _NORMS[dtype]
    if not least < norm < most:
        return None
    basis = _filtered(gram, count, _TOLERANCE * norm)
    del gram
    for _ in range(_PROOFS):
        if basis is None:
            break
        found, basis = _proven(wide, basis, count, norm)
        if found is not None:
            return found
        basis = None if basis is None else _orthonormal(basis)
    return None


def _all(wide: Matrix, backend: MergingBackend) -> LeftVectors:
    gram = Gram.of(wide, torch.float64, backend)
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
    """A block that holds the first ``count`` eigenvectors, or nearly so, as far as the dtype can tell; None: not soon.

    Those that are found are taken out of ``gram``: what is left falls less, and bears higher degrees.
    """
    size, width, dtype = gram.size, width_of(count), gram.dtype
    left = _PATIENCE * size // width  # products with the block
    block = torch.randn(size, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    for _ in range(2):
        block = _orthonormal(gram @ block)
    done, before = RitzVectors.none(size, dtype), math.inf
    while True:
        found = done.beside(ritz(block, gram @ block))
        errors, squares = squared_errors(found, count), found.squares
        error, cut = math.sqrt(float(errors.sum())), float(squares[-1])
        if error <= tolerance or before / 2 < error < _NEAR * tolerance:
            return found.vectors
        before = error
        if cut <= 0 or float(squares[count - 1]) < _LOST[dtype] * float(squares[0]):
            return None
        new = slice(len(done.squares), max(len(done.squares), _ready(found, errors, tolerance, torch.finfo(dtype).eps)))
        gram.take_out(found.vectors[:, new], squares[new])
        done, rest = found.first(new.stop), found.after(new.stop)
        del found
        # a polynomial of degree d enlarges what lies at x times the cut by about exp(d * acosh(2 x - 1))
        ends = rest.squares[0], squares[count - 1]
        most, least = (math.acosh(max(2 * float(end) / cut - 1, 1.0)) for end in ends)
        missing = math.log(3 * error / tolerance)
        if missing > least * left:
            return None
        allowed = min(_DEGREE, _GROWTH / most, _SPREAD[dtype] / max(most - least, 1e-9))
        degree = max(1, int(min(math.ceil(missing / least), allowed)))
        block = gram.enlarged(rest.vectors, cut, degree)
        del rest
        block = _orthonormal(block)
        left -= degree + 1


def _ready(found: RitzVectors, errors: Floats, tolerance: float, eps: float) -> int:
    """How many of the first need nothing more: together they are within half of the tolerance, or as exact as ``eps``
    has it. Of the wanted the last one, at least, is none of them."""
    count = len(errors)
    exact = found.residuals[:count] <= _ROUNDINGS * eps * found.squares[:count]
    waiting = ~exact & (errors > tolerance**2 / (4 * count))
    waiting[-1] = True
    return int(waiting.argmax())


def _proven(
    wide: Matrix, basis: torch.Tensor, count: int, norm: float
) -> tuple[LeftVectors | None, torch.Tensor | None]:
    """The first ``count`` within ``basis``, where they are within the tolerance; where they nearly are a better block,
    in float64. ``norm``: D's. Products are of the basis's dtype."""
    product, rows, whole = _multiplied(wide, basis)
    found, turn = exact_ritz(basis, product)
    error, tolerance = math.sqrt(float(squared_errors(found, count).sum())), _TOLERANCE * norm
    rounding = norm * torch.finfo(basis.dtype).eps / math.sqrt(len(basis))  # in an unrelated direction
    if math.hypot(error, confusion(found.squares, count, rounding)) > tolerance:
        return None, product.double() @ turn if error < _NEAR * tolerance else None
    squares, turn = torch.from_numpy(found.squares[:count]).clamp_min(0), turn[:, :count].float()

    def coordinates(rank: int) -> torch.Tensor:
        return turn[:, :rank].T @ rows

    rest = max(whole - float(squares.sum()), 0.0)
    return LeftVectors(squares.sqrt(), found.vectors[:, :count], rest, coordinates), None


def _multiplied(wide: Matrix, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """``D D^T basis`` ``[n, b]``, in the basis's dtype; ``basis^T D`` ``[b, m]``, float32; the square of D's norm."""
    product = torch.zeros(basis.shape, dtype=basis.dtype)
    rows, whole = torch.empty(basis.shape[1], wide.shape[1]), 0.0
    for at in blocks(wide, _PROOF_BYTES // basis.dtype.itemsize):
        columns = block(wide, at)
        whole += square(columns)
        columns = columns.to(basis.dtype)
        ours = basis.T @ columns
        product.addmm_(columns, ours.T)
        rows[:, at.columns] = ours
    return product, rows, whole


def _orthonormal(block: torch.Tensor) -> torch.Tensor:
    q: torch.Tensor = torch.linalg.qr(block).Q
    return q
