"""The segmented low-rank product: many adapters of many ranks in one batch.

Contract, in place on y, for every segment g (rows o[g]:o[g+1], terms t with slots and weights c) and output part p::

    y[rows, p] = y[rows, p] * (1 + sum_t c_t (o[t, p] - 1))
                 + sum_t c_t * ((x[rows] @ A[t, p].T) @ B[t, p].T + d[t, p])

and, for the layer to multiply its base weight by, in place of x::

    x'[rows] = x[rows] * (1 + sum_t c_t (i[t] - 1))

x is ``[T, in]``; y is ``[T, sum(part_sizes)]``, contiguous, of x's dtype, and does not alias x. A is ``[r, in]`` and
B is ``[out_p, r]``: true ranks, each (slot, part) its own, or absent. o (``out_scale``) and d (``shift``) are
``[out_p]``, i (``in_scale``) is ``[in]``; an absent scale is 1, an absent shift 0. A packed layer (q, k, v) is one
table with three parts, so that x is read once. Whoever makes a SlotDelta folds the low-rank scale and the slot's own
out_scale into B and its own in_scale into A: ``add_`` takes the layer's x as it was before ``scale_input``. Products
accumulate in float32. No float atomics: the same input gives the same bits.

Rows in no segment are never touched. A term whose slot holds nothing in this table (an adapter that leaves this layer
alone) adds nothing; a slot that holds nothing in any table of the backend is refused by ``prepare``. An empty plan,
T = 0 and rank 1 all work. Nothing of one segment (NaN or Inf in its rows of x, overflow in its products) may reach
another segment's rows; factors themselves are finite, because ``pack`` refuses others.

The embedding form replaces ``x[rows] @ A.T`` by the lookup ``A[:, token_ids[rows]].T``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

import torch

from loraplex_kernels.lora.slots import SlotBook
from loraplex_kernels.segments import SegmentPlan


class Factors(NamedTuple):
    """One low-rank pair, scale already folded into b."""

    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]


class PartDelta(NamedTuple):
    """What one slot changes at one output part; what is None is not changed."""

    factors: Factors | None = None
    out_scale: torch.Tensor | None = None  # [out]
    shift: torch.Tensor | None = None  # [out]


class SlotDelta(NamedTuple):
    """What one slot changes at one table: one entry per part, None where the adapter has nothing there."""

    parts: tuple[PartDelta | None, ...]
    in_scale: torch.Tensor | None = None  # [in]


class Packed(Protocol):
    """A SlotDelta in a backend's own layout, checked, on the host: all that ``write`` still has to do is copy."""

    @property
    def nbytes(self) -> int: ...


class StepPlan(Protocol):
    """A SegmentPlan made ready by one backend: device metadata, written once a step, shared by all tables."""

    @property
    def segments(self) -> SegmentPlan: ...


class StaticStepPlan(StepPlan, Protocol):
    """A StepPlan whose device memory never moves, for a captured graph: ``set`` writes another plan into it.

    Fresh, it stands for some adapters (so that layers capture their nodes) and no row of them.
    """

    @property
    def keys(self) -> Sequence[Hashable]:
        """The graph keys that it can be captured for, that of most plans first."""
        ...

    def capturing(self, key: Hashable) -> StepPlan:
        """This plan, to capture a graph with that serves plans of ``key``, one of ``keys``: in the same memory, and
        moved by the same ``set``."""
        ...

    def set(self, plan: SegmentPlan) -> bool:
        """Make this the plan of the next replay; False, and nothing changed, when it has too many rows or terms.

        Raises ValueError as ``prepare`` does. A graph serves plans of the ``graph_key`` that it was captured for.
        """
        ...


class LoraTable(Protocol):
    """The device rows of one linear or embedding layer: slot -> delta. The backend owns the layout."""

    in_features: int
    part_sizes: tuple[int, ...]

    def pack(self, delta: SlotDelta) -> Packed:
        """Check and lay out a delta for this table. Touches nothing of the table: any thread may call it.

        Raises ValueError naming part and shapes when it does not fit, changes nothing at all, or holds values that
        are not finite in the table's dtype (vectors: in float32).
        """
        ...

    def write(self, slot: int, packed: Packed) -> None:
        """Put what this table's ``pack`` made into ``slot``, replacing what was there.

        On a GPU the copy may still be under way when this returns; steps launched later wait for it on the device,
        ``LoraBackend.fence`` tells when it is over, and until then the table keeps what it reads of ``packed``. Slots
        may be cleared and written meanwhile: what is written later lands later. The same ``packed`` may be written
        again, to any slot. Raises ValueError for a negative slot, MemoryError when the
        table would grow beyond its ``max_bytes`` or the device has no room; the slot then holds what it held.
        """
        ...

    def clear(self, slot: int) -> None:
        """Forget ``slot``; a no-op when it holds nothing."""
        ...

    def scale_input(self, x: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """x' of the contract: x itself when no slot of the plan scales its input here, else a new tensor."""
        ...

    def add_(self, y: torch.Tensor, x: torch.Tensor, plan: StepPlan) -> None:
        """The contract above."""
        ...

    def add_lookup_(self, y: torch.Tensor, token_ids: torch.Tensor, plan: StepPlan) -> None:
        """The embedding form; ``token_ids`` is ``[T]`` int64."""
        ...


class Fence(Protocol):
    """A point in a backend's uploads."""

    def done(self) -> bool:
        """Whether everything written before the fence is on the device."""
        ...


class LoraBackend(Protocol):
    """Makes tables and step plans. Chosen once at start."""

    name: str
    #: which slots hold anything; tables of other ops that serve the same slots enter theirs too
    slots: SlotBook

    def new_table(
        self, in_features: int, part_sizes: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, max_bytes: int
    ) -> LoraTable:
        """An empty table that may grow to ``max_bytes``; memory is taken as slots are written, not before."""
        ...

    def prepare(self, plan: SegmentPlan) -> StepPlan:
        """Turn a plan into what this backend's tables read; called once a step.

        Raises ValueError naming a slot that holds nothing in any table of this backend: its rows would silently get
        the base model's output.
        """
        ...

    def static_plan(self, max_rows: int, max_terms: int) -> StaticStepPlan | None:
        """A plan for captured graphs, for up to ``max_rows`` rows and ``max_terms`` (segment, term) pairs.

        None: this backend's kernels cannot be captured.
        """
        ...

    def graph_key(self, plan: SegmentPlan) -> Hashable:
        """Plans of equal keys launch the same kernels, so that one captured graph serves them all."""
        ...

    def fence(self) -> Fence:
        """A fence behind every write so far."""
        ...
