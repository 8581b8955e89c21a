"""The segmented low-rank product: many adapters of many ranks in one batch.

Contract, in place on y, for every segment g (rows o[g]:o[g+1]) and each of its terms (slot t, weight c)::

    y[rows, part p] += c * (x[rows] @ A[t, p].T) @ B[t, p].T            p over the table's output parts

x is ``[T, in]``; y is ``[T, sum(part_sizes)]``, contiguous, of x's dtype, and does not alias x. A is ``[r, in]`` and
B is ``[out_p, r]``: true ranks, each (slot, part) its own, or absent. A packed layer (q, k, v) is one table with three
parts, so that x is read once. Scales are folded into B by whoever writes the slot. Products accumulate in float32.
Rows in no segment are never touched. A term whose slot holds nothing in this table adds nothing. An empty plan,
T = 0 and rank 1 all work. Nothing of one segment (NaN or Inf in its rows of x, overflow in its products) may reach
another segment's rows; factors themselves are finite, because ``write`` refuses others.

The embedding form replaces ``x[rows] @ A.T`` by the lookup ``A[:, token_ids[rows]].T``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from loraplex_kernels.segments import SegmentPlan


class Factors(NamedTuple):
    """One low-rank pair, scale already folded into b."""

    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]


class StepPlan(Protocol):
    """A SegmentPlan made ready by one backend: device metadata, written once a step, shared by all tables."""

    @property
    def segments(self) -> SegmentPlan: ...


class LoraTable(Protocol):
    """The device rows of one linear or embedding layer: slot -> factors. The backend owns the layout."""

    in_features: int
    part_sizes: tuple[int, ...]

    def write(self, slot: int, parts: Sequence[Factors | None]) -> None:
        """Put factors (one per part, None where the adapter has none) into ``slot``, replacing what was there.

        Raises ValueError naming slot, part and shapes when they do not fit or hold values that are not finite in the
        table's dtype, MemoryError when the table would grow beyond its ``max_bytes``.
        """
        ...

    def clear(self, slot: int) -> None:
        """Forget ``slot``; a no-op when it holds nothing."""
        ...

    def add_(self, y: torch.Tensor, x: torch.Tensor, plan: StepPlan) -> None:
        """The contract above."""
        ...

    def add_lookup_(self, y: torch.Tensor, token_ids: torch.Tensor, plan: StepPlan) -> None:
        """The embedding form; ``token_ids`` is ``[T]`` int64."""
        ...


class LoraBackend(Protocol):
    """Makes tables and step plans. Chosen once at start."""

    name: str

    def new_table(
        self, in_features: int, part_sizes: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, max_bytes: int
    ) -> LoraTable:
        """An empty table that may grow to ``max_bytes``; memory is taken as slots are written, not before."""
        ...

    def prepare(self, plan: SegmentPlan) -> StepPlan:
        """Turn a plan into what this backend's tables read; called once a step."""
        ...
