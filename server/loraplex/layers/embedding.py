"""Both ends of the vocabulary: token ids to hidden states, hidden states to logits, each cut over ranks by rows.

A tied head is a second, multiplied form of the same matrix; adapters target the two apart, as PEFT does. What adapters
have for tokens past the base's vocabulary is the first rank's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.layers.rows import OwnedRows
from loraplex.layers.rows_table import RowsTable, replaces_all
from loraplex.parallel.group import TPGroup
from loraplex.quant.base import Rows, Weight
from loraplex_kernels.lora import LoraTable, StepPlan

#: columns that an embedding's table has behind those of a rank's tokens, where there are other ranks: zeros, for theirs
FOREIGN_COLUMNS: Final = 1


@dataclass(frozen=True, slots=True)
class Changes:
    """Where adapters' changes of one site live."""

    table: LoraTable
    rows: RowsTable


class Embedding:
    """A rank's rows of the embedding, ``[V_local, H]``, looked up; the rank that owns an id supplies its row, and the
    first rank those of tokens that adapters add. One sum over the ranks brings them together, adapters' terms included.

    Nothing is multiplied by its input, so an adapter's ``in_scale`` has no meaning here and is not asked for.
    """

    __slots__ = ("_group", "_held", "_look_up_base", "_share", "_vocab_size", "rows", "site", "table", "weight")

    def __init__(self, site: str, weight: Rows, changes: Changes, vocab_size: int, group: TPGroup) -> None:
        """``vocab_size`` counts the rows of all ranks."""
        self.site = site
        self.table = changes.table
        self.rows = changes.rows
        self._held = changes.rows.held
        self.weight = weight
        self._look_up_base = weight.look_up
        self._share = weight.shape[0]
        self._vocab_size = vocab_size
        self._group = group

    def __call__(self, token_ids: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        """``[T]`` int64 -> a new ``[T, H]``; ids past the base's vocabulary stand in rows whose adapter has them."""
        owned = self.rows.of(adapters) if self._held else ()
        if self._group.size > 1:
            x = self._look_up(*self._own(token_ids), adapters, owned)
            return self._group.all_reduce_(x)
        if owned:
            return self._look_up(token_ids, None, adapters, owned)
        x = self._look_up_base(token_ids)
        if adapters.segments.segments:
            self.table.add_lookup_(x, token_ids, adapters)
        return x

    def _own(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids as this rank counts its rows, added tokens behind the base's; and which tokens are other ranks' ``[T]``,
        whose id is 0."""
        share, rank = self._share, self._group.rank
        ids = token_ids - rank * share
        is_foreign = (ids < 0) | (ids >= share)
        if rank == 0:
            is_added = token_ids >= self._vocab_size
            ids = torch.where(is_added, token_ids - self._vocab_size + share, ids)
            is_foreign &= ~is_added
        return ids.masked_fill(is_foreign, 0), is_foreign

    def _look_up(
        self, ids: torch.Tensor, is_foreign: torch.Tensor | None, adapters: StepPlan, owned: Sequence[OwnedRows]
    ) -> torch.Tensor:
        """What this rank has of its rows ``ids``: its own, those of adapters, and the table's terms on top."""
        share = self._share
        wide = [one for one in owned if one.rows.num_added]
        # neither the base nor the table has what is past the base's last token
        known = ids.clamp(max=share - 1) if wide else ids
        x = self._look_up_base(known)
        for one in owned:
            one.rows.look_up_(x[one.segment], ids[one.segment])
        if is_foreign is not None:
            x.masked_fill_(is_foreign.unsqueeze(1), 0)
            known = known.masked_fill(is_foreign, share)  # a column of zeros
        if adapters.segments.segments:
            own = [x[one.segment].clone() for one in wide]
            self.table.add_lookup_(x, known, adapters)
            for one, rows in zip(wide, own, strict=True):
                is_added = (ids[one.segment] >= share).unsqueeze(1)
                x[one.segment] = torch.where(is_added, rows, x[one.segment])
        return x


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

        Where an adapter of the rows adds tokens, V is the widest one's, and a row is -inf past its own; of several
        ranks the first alone has logits of added tokens.
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
        products = [(one, one.rows.multiply(scaled[one.segment])) for one in owned]
        is_all = replaces_all(owned, len(hidden))  # nothing of the base is left
        if is_all and len(owned) == 1 and not owned[0].rows.num_added:
            logits = products[0][1]
        else:
            shape = len(hidden), self.weight.shape[0]
            logits = hidden.new_empty(shape) if is_all else self.weight.matmul(scaled, None)
            for one, product in products:
                one.rows.put_known_(logits[one.segment], product)
        self.table.add_(logits, hidden, adapters)
        logits = self._group.all_gather(logits, -1)
        num_known, share = logits.shape[1], self.weight.shape[0]
        num_added = max(one.rows.reach for one in owned) - share
        if num_added <= 0:
            return logits.float()
        wide = torch.empty(len(hidden), num_known + num_added, dtype=torch.float32, device=hidden.device)
        wide[:, :num_known] = logits
        wide[:, num_known:] = -math.inf
        for one, product in products:
            if one.rows.num_added:  # its columns are counted from this rank's first one
                one.rows.put_added_(wide[one.segment, num_known - share :], product)
        return wide
