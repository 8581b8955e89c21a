"""The one linear layer: a base product, the adapters' terms, and the row-parallel sum, in that order.

It does not know how its weight is stored, how adapters are laid out, or which model it stands in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.layers.rows import RowsTable
from loraplex.parallel.group import TPGroup
from loraplex.parallel.shard import Shard
from loraplex.quant.base import Weight
from loraplex_kernels.lora import LoraTable, StepPlan


@dataclass(frozen=True, slots=True)
class LinearParts:
    """What a layer multiplies by: the packed weight, its bias and the table of all its parts' adapters.

    Under ``Shard.ROW`` only rank 0 holds the bias, so that the sum over ranks adds it once.
    """

    weight: Weight
    bias: torch.Tensor | None
    table: LoraTable
    #: one for each part
    rows: tuple[RowsTable, ...]


class Linear:
    """``y = x W.T + bias``, changed by the adapters' terms: ``[T, in]`` -> ``[T, sum of parts]``.

    ``sites`` are the checkpoint names of the parts, in the order their outputs stand in y.
    """

    __slots__ = ("_bias", "_matmul", "_reduce", "_table", "group", "rows", "shard", "sites", "weight")

    def __init__(self, sites: tuple[str, ...], parts: LinearParts, shard: Shard, group: TPGroup) -> None:
        self.sites = sites
        self.shard = shard
        self.group = group
        self.weight = parts.weight
        self._matmul = parts.weight.matmul
        self._bias = parts.bias
        self._table = parts.table
        self.rows = parts.rows
        self._reduce = shard is Shard.ROW and group.size > 1

    @property
    def bias(self) -> torch.Tensor | None:
        return self._bias

    @property
    def table(self) -> LoraTable:
        return self._table

    def __call__(self, x: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        if adapters.segments.segments:
            y = self._matmul(self._table.scale_input(x, adapters), self._bias)
            self._table.add_(y, x, adapters)
        else:
            y = self._matmul(x, self._bias)
        if self._reduce:
            self.group.all_reduce_(y)
        return y
