"""Both ends of the vocabulary: token ids to hidden states, hidden states to logits, each cut over ranks by rows.

A tied head is a second, multiplied form of the same matrix; adapters target the two apart, as PEFT does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from loraplex.layers.rows import OwnedRows
from loraplex.layers.rows_table import RowsTable, replaces_all
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

    __slots__ = ("_group", "_held", "_vocab", "rows", "site", "table", "tensor")

    def __init__(self, site: str, tensor: torch.Tensor, changes: Changes, vocab: slice, group: TPGroup) -> None:
        self.site = site
        self.table = changes.table
        self.rows = changes.rows
        self._held = changes.rows.held
        self.tensor = tensor
        self._vocab = vocab
        self._group = group

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def __call__(self, token_ids: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        """``[T]`` int64 -> a new ``[T, H]``; ids past the base's vocabulary stand in rows whose adapter has them."""
        if self._held and (owned := self.rows.of(adapters)):
            return self._with_rows(token_ids, adapters, owned)
        x = self._look_up(token_ids)
        if adapters.segments.segments:
            # the table is replicated, so its terms come after the sum over ranks
            self.table.add_lookup_(x, token_ids, adapters)
        return x

    def _with_rows(self, token_ids: torch.Tensor, adapters: StepPlan, owned: Sequence[OwnedRows]) -> torch.Tensor:
        wide = [one for one in owned if one.rows.num_added]
        known = token_ids.clone() if wide else token_ids
        for one in wide:  # neither the base nor the table has what is past the base's last token
            known[one.segment].clamp_(max=self.rows.site.num_rows - 1)
        x = self._look_up(known)
        for one in owned:
            one.rows.look_up_(x[one.segment], token_ids[one.segment])
        own = [x[one.segment].clone() for one in wide]
        self.table.add_lookup_(x, known, adapters)
        for one, rows in zip(wide, own, strict=True):
            added = (token_ids[one.segment] >= self.rows.site.num_rows).unsqueeze(1)
            x[one.segment] = torch.where(added, rows, x[one.segment])
        return x

    def _look_up(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.tensor) if self._group.size == 1 else self._gather(token_ids)

    def _gather(self, token_ids: torch.Tensor) -> torch.Tensor:
        foreign = (token_ids < self._vocab.start) | (token_ids >= self._vocab.stop)
        local = (token_ids - self._vocab.start).masked_fill(foreign, 0)
        x = F.embedding(local, self.tensor).masked_fill_(foreign.unsqueeze(-1), 0)
        return self._group.all_reduce_(x)


class Head:
    """Hidden states of sampled rows to logits over the whole vocabulary."""

    __slots__ = ("_group", "_held", "rows", "site", "table", "weight")

    def __init__(self, site: str, weight: Weight, changes: Changes, group: TPGroup) -> None:
        self.site = site
        self.weight = weight
        self.table = changes.table
        self.rows = changes.rows
        self._held = changes.rows.held
        self._group = group

    def __call__(self, hidden: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        """``[S, H]`` -> float32 ``[S, V]``; ``adapters`` are segments over the S rows.

        Where an adapter of the rows adds tokens, V is the widest one's, and a row is -inf past its own.
        """
        if self._held and (owned := self.rows.of(adapters)):
            return self._with_rows(hidden, adapters, owned)
        if adapters.segments.segments:
            logits = self.weight.matmul(self.table.scale_input(hidden, adapters), None)
            self.table.add_(logits, hidden, adapters)
        else:
            logits = self.weight.matmul(hidden, None)
        return self._group.all_gather(logits, -1).float()

    def _with_rows(self, hidden: torch.Tensor, adapters: StepPlan, owned: Sequence[OwnedRows]) -> torch.Tensor:
        scaled = self.table.scale_input(hidden, adapters)
        if replaces_all(owned, len(hidden)):
            logits = hidden.new_empty(len(hidden), self.weight.shape[0])  # nothing of the base is left
        else:
            logits = self.weight.matmul(scaled, None)
        products = [(one, one.rows.multiply(scaled[one.segment])) for one in owned]
        for one, product in products:
            one.rows.put_known_(logits[one.segment], product)
        self.table.add_(logits, hidden, adapters)
        logits = self._group.all_gather(logits, -1)
        num_known, reach = logits.shape[1], max(one.rows.reach for one in owned)
        if reach <= num_known:
            return logits.float()
        wide = torch.empty(len(hidden), reach, dtype=torch.float32, device=hidden.device)
        wide[:, :num_known] = logits
        wide[:, num_known:] = -math.inf
        for one, product in products:
            if one.rows.num_added:
                one.rows.put_added_(wide[one.segment], product)
        return wide
