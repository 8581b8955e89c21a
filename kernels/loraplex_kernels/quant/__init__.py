"""Products with quantized matrices: one stored form for every published format, decoded while it is multiplied.

Contract: a matrix ``W`` of shape ``[out, in]`` is codes and scales (``stored.StoredMatrix``), and::

    y = x @ W.T + bias        x [T, in], y [T, out] of x's dtype, bias [out] or None; T may be 0

Every weight that a product multiplies by is the one that ``stored.decode`` gives in the compute dtype: decoded in
float32, rounded as its format's own library rounds, then to the compute dtype. A backend may leave the last rounding
out, where it multiplies a sum by the scale that a whole row shares. Products accumulate in float32. The same
input gives the same bits, and a row of y depends on its own row of x alone, so that nothing non-finite reaches another
row.

Stacked matrices (q, k, v) are one ``QuantMatrix``: the parts need not be stored alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from loraplex_kernels.lora import LoraTable, StepPlan
from loraplex_kernels.quant.stored import StoredMatrix


class Joined(Protocol):
    """The product of a layer and its adapters' terms, done as one."""

    def __call__(
        self, scaled: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, plan: StepPlan
    ) -> torch.Tensor:
        """``multiply(scaled, bias)`` and the table's ``add_`` of x and plan: a new contiguous ``[T, out]``.

        ``scaled`` is what ``scale_input`` made of x. y has the bits that the two calls give it.
        """
        ...


class QuantMatrix(Protocol):
    """Stacked matrices in a backend's own layout."""

    #: (out, in)
    shape: tuple[int, int]
    #: everything it keeps
    nbytes: int

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ W.T + bias``: ``[T, in]`` -> a new contiguous ``[T, out]``."""
        ...

    def join(self, table: LoraTable) -> Joined | None:
        """This matrix and the table of its layer as one product; None where a call each is all there is."""
        ...

    def dequantize(self) -> torch.Tensor:
        """W as a new dense tensor ``[out, in]`` in the compute dtype."""
        ...

    def look_up(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of W: ``[T]`` int64, each below out -> a new ``[T, in]`` in the compute dtype."""
        ...


class QuantBackend(Protocol):
    """One way of multiplying by quantized matrices. Chosen once, at start."""

    name: str

    def matrix(self, parts: Sequence[StoredMatrix], dtype: torch.dtype) -> QuantMatrix:
        """Keep ``parts``, stacked by rows in order, all on one device; products are in ``dtype``.

        Takes the parts over: their tensors may become its own. Raises ValueError when their columns differ.
        """
        ...
