"""Both ends of the vocabulary: token ids to hidden states, hidden states to logits, each cut over ranks by rows.

A tied head is a second, multiplied form of the same matrix; adapters target the two apart, as PEFT does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from loraplex.layers.rows import RowsTable
from loraplex.parallel.group import TPGroup
from loraplex.quant.base import Weight
from loraplex_kernels.lora import LoraTable, StepPlan


@dataclass(frozen=True, slots=True)
class Changes:
    """Where adapters' changes of one site live."""

    table: LoraTable
    rows: RowsTable


class Embedding:
    """Rows ``vocab`` of the embedding, ``[V_local, H]``, looked up; the rank that owns an id supplies its row.

    Nothing is multiplied by its input, so an adapter's ``in_scale`` has no meaning here and is not asked for.
    """

    __slots__ = ("_group", "_vocab", "rows", "site", "table", "tensor")

    def __init__(self, site: str, tensor: torch.Tensor, changes: Changes, vocab: slice, group: TPGroup) -> None:
        self.site = site
        self.table = changes.table
        self.rows = changes.rows
        self.tensor = tensor
        self._vocab = vocab
        self._group = group

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def __call__(self, token_ids: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        """``[T]`` int64 -> a new ``[T, H]``."""
        x = F.embedding(token_ids, self.tensor) if self._group.size == 1 else self._gather(token_ids)
        if adapters.segments.segments:
            # the table is replicated, so its terms come after the sum over ranks
            self.table.add_lookup_(x, token_ids, adapters)
        return x

    def _gather(self, token_ids: torch.Tensor) -> torch.Tensor:
        foreign = (token_ids < self._vocab.start) | (token_ids >= self._vocab.stop)
        local = (token_ids - self._vocab.start).masked_fill(foreign, 0)
        x = F.embedding(local, self.tensor).masked_fill_(foreign.unsqueeze(-1), 0)
        return self._group.all_reduce_(x)


class Head:
    """Hidden states of sampled rows to logits over the whole vocabulary."""

    __slots__ = ("_group", "rows", "site", "table", "weight")

    def __init__(self, site: str, weight: Weight, changes: Changes, group: TPGroup) -> None:
        self.site = site
        self.weight = weight
        self.table = changes.table
        self.rows = changes.rows
        self._group = group

    def __call__(self, hidden: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        """``[S, H]`` -> float32 ``[S, V]``; ``adapters`` are segments over the S rows."""
        if adapters.segments.segments:
            logits = self.weight.matmul(self.table.scale_input(hidden, adapters), None)
            self.table.add_(logits, hidden, adapters)
        else:
            logits = self.weight.matmul(hidden, None)
        return self._group.all_gather(logits, -1).float()
