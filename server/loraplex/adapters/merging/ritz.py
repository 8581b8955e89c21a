"""The best eigenvectors of ``D D^T`` within a block of orthonormal vectors (Ritz vectors), and how far from the truth
they may take ``U U^T D``.

Source: the bound is Davis and Kahan's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

#: of a few numbers, with which NumPy does not hand Python to another thread, and back, at each operation
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RitzVectors:
    """The best eigenvectors within a block. ``vectors`` ``[n, b]``, orthonormal; ``squares`` ``[b]``: eigenvalues,
    falling; ``residuals`` ``[b]``: the norm of each one's."""

    vectors: torch.Tensor
    squares: Floats
    residuals: Floats

    @staticmethod
    def none(size: int, dtype: torch.dtype) -> RitzVectors:
        return RitzVectors(torch.empty(size, 0, dtype=dtype), np.empty(0), np.empty(0))

    def beside(self, others: RitzVectors) -> RitzVectors:
        return RitzVectors(
            torch.cat((self.vectors, others.vectors), 1),
            np.concatenate((self.squares, others.squares)),
            np.concatenate((self.residuals, others.residuals)),
        )

    def first(self, number: int) -> RitzVectors:
        """A copy."""
        return RitzVectors(self.vectors[:, :number].clone(), self.squares[:number], self.residuals[:number])

    def after(self, number: int) -> RitzVectors:
        return RitzVectors(self.vectors[:, number:], self.squares[number:], self.residuals[number:])


def ritz(block: torch.Tensor, product: torch.Tensor) -> RitzVectors:
    """``product`` is the matrix's with ``block``, which is orthonormal."""
    found, _ = _along(block, product, *_turned(block.T @ product))
    return found


def exact_ritz(block: torch.Tensor, product: torch.Tensor) -> tuple[RitzVectors, torch.Tensor]:
    """The same in float64, of a block that is orthonormal as far as its dtype goes; and what the block was multiplied
    by, ``[b, b]``."""
    exact = block.double()
    root = torch.linalg.cholesky(exact.T @ exact)
    straight = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=False).T
    squares, turn = _turned(straight.T @ (exact.T @ product.double()) @ straight)
    return _along(exact, product, squares, straight @ turn)


def _turned(ours: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of a small matrix, falling, and its vectors, float64."""
    rising, turn = torch.linalg.eigh(ours.double())
    return rising.flip(0), turn.flip(1)


def _along(
    block: torch.Tensor, product: torch.Tensor, squares: torch.Tensor, turn: torch.Tensor
) -> tuple[RitzVectors, torch.Tensor]:
    turn = turn.to(block.dtype)
    residuals = product.to(block.dtype) @ turn
    vectors = block @ turn
    residuals.addcmul_(vectors, squares.to(block.dtype), value=-1)
    scale = float(squares[0]) or 1.0  # so that their squares stay within the block's range
    norms = torch.linalg.vector_norm(residuals.div_(scale), dim=0).double().numpy() * scale
    return RitzVectors(vectors, squares.numpy(), norms), turn


def squared_errors(found: RitzVectors, count: int) -> Floats:
    """The square of how far each of the first ``count`` may take ``U U^T D`` from the truth, in the Frobenius norm,
    ``[count]``.

    A wanted vector i leans by an angle towards what is outside the block, whose eigenvalues are at most about the
    block's last; and through that towards an unwanted vector j of the block, the more, the nearer their eigenvalues
    are. An angle between i and j moves the product by it times ``sqrt(s_i^2 + s_j^2)``.
    """
    squares, residuals = found.squares, found.residuals
    wanted, others = squares[:count, None], squares[None, count:]  # [r, 1], [1, e]
    outside = _angle(residuals[:count, None], wanted - squares[-1])
    inside = _angle(outside * residuals[None, count:], wanted - others)
    moved: Floats = outside**2 * (wanted + squares[-1]) + (inside**2 * (wanted + others)).sum(1, keepdims=True)
    return moved.reshape(-1).clip(0)


def confusion(squares: Floats, count: int, rounding: float) -> float:
    """How far ``U U^T D`` may be from the truth because rounding takes wanted vectors for others of the block, which no
    residual shows. ``rounding``: of a product with D in the direction of one vector, for one of length 1."""
    squares = np.maximum(squares, 0)
    wanted, others = squares[:count, None], squares[None, count:]
    angles = _angle(rounding * np.sqrt(wanted), wanted - others)
    return math.sqrt(float((angles**2 * (wanted + others)).sum()))


def _angle(residual: Floats, gap: Floats) -> Floats:
    """1 at most."""
    angle: Floats = np.divide(residual, np.maximum(gap, np.maximum(residual, np.finfo(np.float64).tiny)))
    return angle
