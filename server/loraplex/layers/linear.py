"""The one linear layer: a base product, the adapters' terms, and the row-parallel sum, in that order.

It does not know how its weight is stored, how adapters are laid out, or which model it stands in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loraplex.layers.rows import RowsForm, RowsSite
from loraplex.layers.rows_table import RowsTable, put_products_, replaces_all
from loraplex.parallel.group import TPGroup
from loraplex.parallel.shard import Shard
from loraplex.quant.base import Weight
from loraplex_kernels.lora import LoraTable, StepPlan
from loraplex_kernels.quant import Joined


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

    __slots__ = (
        "_bias",
        "_find",
        "_folded",
        "_held",
        "_joined",
        "_matmul",
        "_parts",
        "_reduce",
        "_table",
        "folded",
        "group",
        "rows",
        "shard",
        "sites",
        "weight",
    )

    def __init__(self, sites: tuple[str, ...], parts: LinearParts, shard: Shard, group: TPGroup) -> None:
        self.sites = sites
        self.shard = shard
        self.group = group
        self.weight = parts.weight
        self._matmul = parts.weight.matmul
        self._bias = parts.bias
        self._table = parts.table
        self._joined: Joined = parts.weight.join(parts.table) or _InTurn(parts.weight, parts.table)
        self.rows = parts.rows
        memory = parts.rows[0].memory
        self._held = memory.slots  # of rows at any site of the model
        self._find = memory.find
        sizes = sum(parts.table.part_sizes), parts.table.in_features
        #: of all parts together, with an adapter folded in
        self.folded = RowsTable(
            RowsSite(RowsForm.MULTIPLIED, *sizes, parts.rows[0].site.dtype, folded=True), parts.rows[0].memory
        )
        self._folded = self.folded.held
        self._parts = tuple(zip(_columns(parts.table.part_sizes), parts.rows, strict=True))
        self._reduce = shard is Shard.ROW and group.size > 1

    @property
    def bias(self) -> torch.Tensor | None:
        return self._bias

    @property
    def table(self) -> LoraTable:
        return self._table

    def __call__(self, x: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        if adapters.segments.segments:
            found = self._find(adapters.segments) if self._held else None
            if found is None or not found.owners:
                y = self._joined(self._table.scale_input(x, adapters), x, self._bias, adapters)
            elif found.alone >= 0:
                own = self._folded.get(found.alone)
                y = self._matmul(x, self._bias) if own is None else own.multiply(x)
            else:
                y = self._with_rows(self._table.scale_input(x, adapters), adapters)
                self._table.add_(y, x, adapters)
        else:
            y = self._matmul(x, self._bias)
        if self._reduce:
            self.group.all_reduce_(y)
        return y

    def _with_rows(self, x: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        """The base product, some outputs of some rows replaced by those of adapters' own rows."""
        found = [(columns, owned) for columns, table in self._parts if (owned := table.of(adapters))]
        every = len(found) == len(self._parts) and all(replaces_all(owned, len(x)) for _, owned in found)
        # where nothing of the base is left it is not asked
        y = x.new_empty(len(x), self.weight.shape[0]) if every else self._matmul(x, self._bias)
        for columns, owned in found:
            put_products_(y[:, columns], x, owned)
        return y


class _InTurn:
    """``Joined`` for a weight that cannot join: one after the other."""

    __slots__ = ("_matmul", "_table")

    def __init__(self, weight: Weight, table: LoraTable) -> None:
        self._matmul = weight.matmul
        self._table = table

    def __call__(
        self, scaled: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, plan: StepPlan
    ) -> torch.Tensor:
        y = self._matmul(scaled, bias)
        self._table.add_(y, x, plan)
        return y


def _columns(part_sizes: tuple[int, ...]) -> Iterator[slice]:
    start = 0
    for size in part_sizes:
        yield slice(start, start + size)
        start += size
