"""Eigenvectors of a symmetric matrix, in the place of the matrix."""

from __future__ import annotations

import torch


def eigh_in_place(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues ``[n]``, rising, and vectors ``[n, n]`` as columns, where ``matrix``, contiguous, was.

    LAPACK writes vectors over its input, and has twice its size to itself meanwhile. Torch gives it a copy, unless the
    input is the output. LAPACK's columns lie one behind the other in memory, as rows do here: the transpose is meant,
    which is the same matrix.
    """
    values = matrix.new_empty(len(matrix))
    torch.linalg.eigh(matrix.T, out=(values, matrix.T))
    return values, matrix.T
