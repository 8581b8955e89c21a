"""Norm weights of a step's rows, for rows whose adapters bring their own: neighbours with few rows each as one.

A decode step of sixteen adapters would else be sixteen small norms at each site. Whether rows are taken together
changes none of their bits on a CPU; elsewhere it is not done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.layers.rows import OwnedRows

#: rows of one adapter up to which a weight for each of them costs less than a norm of their own
_FEW_ROWS: Final = 4


@dataclass(frozen=True, slots=True)
class WeightedRows:
    """Rows of a step, and their norm's weight: ``[n]`` for all of them, or float32 ``[rows, n]``, one for each."""

    rows: slice
    weight: torch.Tensor

    @property
    def num_rows(self) -> int:
        return int(self.rows.stop) - int(self.rows.start)

    @property
    def is_gathered(self) -> bool:
        return self.weight.dim() == 2


def weighted(owned: Sequence[OwnedRows], device: torch.device) -> tuple[WeightedRows, ...]:
    """``owned`` of a norm, in row order, gathered where that pays."""
    found: list[WeightedRows] = []
    run: list[OwnedRows] = []
    for one in owned:
        few = device.type == "cpu" and one.num_rows <= _FEW_ROWS
        if run and not (few and run[-1].segment.stop == one.segment.start):
            found.append(_joined(run))
            run = []
        if few:
            run.append(one)
        else:
            found.append(_joined([one]))
    return (*found, _joined(run)) if run else tuple(found)


def _joined(run: Sequence[OwnedRows]) -> WeightedRows:
    rows = slice(run[0].segment.start, run[-1].segment.stop)
    weights = [one.rows.values for one in run]
    if len(run) == 1:
        assert weights[0] is not None
        return WeightedRows(rows, weights[0])
    each = [
        weight.float().expand(one.num_rows, -1) for one, weight in zip(run, weights, strict=True) if weight is not None
    ]
    return WeightedRows(rows, torch.cat(each))
