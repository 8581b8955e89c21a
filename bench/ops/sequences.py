"""The sequences of one attention step as tensors that lie one after another: what every way starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Sequences:
    """Queries, and every sequence's keys and values with this step's rows last."""

    counts: tuple[tuple[int, int], ...]
    """(query rows, context) of each sequence."""
    q: torch.Tensor  # [T, heads, head_dim]
    keys: tuple[torch.Tensor, ...]  # of each sequence: [context, kv_heads, head_dim]
    values: tuple[torch.Tensor, ...]

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q.shape[2])

    @property
    def group(self) -> int:
        """Query heads of each key/value head."""
        return self.q.shape[1] // self.keys[0].shape[1]

    @property
    def new_keys(self) -> torch.Tensor:
        """This step's rows, [T, kv_heads, head_dim]."""
        return self._new(self.keys)

    @property
    def new_values(self) -> torch.Tensor:
        """This step's rows, [T, kv_heads, head_dim]."""
        return self._new(self.values)

    @property
    def queries(self) -> tuple[torch.Tensor, ...]:
        """Of each sequence: [rows, heads, head_dim]."""
        return torch.split(self.q, [rows for rows, _ in self.counts])

    @property
    def num_bytes(self) -> int:
        """Every context read, this step's keys and values written, queries read, the output written."""
        contexts = sum(tensor.nbytes for tensor in (*self.keys, *self.values))
        row_bytes = self.keys[0][:1].nbytes + self.values[0][:1].nbytes
        return contexts + self.q.shape[0] * row_bytes + 2 * self.q.nbytes

    def copied(self) -> Sequences:
        """The same numbers in other memory."""
        keys, values = (tuple(tensor.clone() for tensor in tensors) for tensors in (self.keys, self.values))
        return replace(self, q=self.q.clone(), keys=keys, values=values)

    def _new(self, contexts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        rows = (context[-queries:] for context, (queries, _) in zip(contexts, self.counts, strict=True))
        return torch.cat(list(rows))
