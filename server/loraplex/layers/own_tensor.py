"""A small parameter of the base that adapters may replace whole: a convolution's kernel, a vector of the heads.

Sequences of one step may have different ones; what a layer then computes with is gathered, one for each sequence.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import torch

from loraplex.layers.rows import OwnedRows
from loraplex.layers.rows_table import RowsTable
from loraplex_kernels.lora import StepPlan
from loraplex_kernels.states import StateSpan


class OwnTensor:
    """A site's ``weight``, ``bias`` or None, as the checkpoint has them, and adapters' own ones in ``rows``."""

    __slots__ = ("_held", "bias", "rows", "site", "weight")

    def __init__(self, site: str, weight: torch.Tensor, bias: torch.Tensor | None, rows: RowsTable) -> None:
        self.site = site
        self.weight = weight
        self.bias = bias
        self.rows = rows
        self._held = rows.held

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def owned(self, adapters: StepPlan) -> Sequence[OwnedRows]:
        """The step's rows whose adapters have their own."""
        return self.rows.of(adapters) if self._held else ()


def by_span(base: torch.Tensor, owned: Sequence[tuple[OwnedRows, torch.Tensor]], starts: Sequence[int]) -> torch.Tensor:
    """``base`` ``[...]`` once for each span ``[S, ...]``, with these in the place of those whose rows have their own.

    ``starts``: the first row of each span. A span lies in one adapter's rows as a whole, or in nobody's.
    """
    each = base.expand(len(starts), *base.shape).clone()
    for one, own in owned:
        first, last = (bisect_left(starts, row) for row in (one.segment.start, one.segment.stop))
        each[first:last] = own
    return each


def span_starts(spans: Sequence[StateSpan]) -> list[int]:
    """The first row of each."""
    return list(accumulate((span.num_rows for span in spans[:-1]), initial=0)) if spans else []
