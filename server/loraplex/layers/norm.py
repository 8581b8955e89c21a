"""Root-mean-square norms: over the hidden size, and over each head of packed queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from loraplex.layers.norm_rows import WeightedRows
from loraplex.layers.rows_table import RowsTable
from loraplex_kernels.lora import StepPlan


class RMSNorm:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, ``[T, H]`` -> a new ``[T, H]``.

    Source: Zhang and Sennrich 2019, eq. 4; transformers' LlamaRMSNorm.
    """

    __slots__ = ("_eps", "_held", "_shape", "rows", "site", "weight")

    def __init__(self, site: str, weight: torch.Tensor, eps: float, rows: RowsTable) -> None:
        self.site = site
        self.weight = weight
        self.rows = rows
        self._held = rows.held
        self._eps = eps
        self._shape = (weight.shape[0],)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        if self._held and (own := self.rows.weights_of(adapters)):
            return self._with_rows(x, own)
        return F.rms_norm(x, self._shape, self.weight, self._eps)

    def _with_rows(self, x: torch.Tensor, own: Sequence[WeightedRows]) -> torch.Tensor:
        if sum(one.num_rows for one in own) == len(x):
            y = torch.empty_like(x)  # nothing of the base is left
        else:
            y = F.rms_norm(x, self._shape, self.weight, self._eps)
        for one in own:
            some = x[one.rows]
            if one.is_gathered:  # as rms_norm does it: in float32, rounded once
                normed = F.rms_norm(some.float(), self._shape, None, self._eps)
                torch.mul(normed, one.weight, out=y[one.rows])
            else:
                y[one.rows] = F.rms_norm(some, self._shape, one.weight, self._eps)
        return y


class HeadNorm:
    """Qwen3's query and key norms in one pass over ``[T, heads + kv_heads, D]``: each head over its own D values."""

    __slots__ = ("_eps", "_held", "_shape", "_weight", "heads", "parts")

    def __init__(self, q: RMSNorm, k: RMSNorm, heads: tuple[int, int], eps: float) -> None:
        """``q`` and ``k`` are the two norms by themselves; ``heads`` how many heads each serves."""
        self.parts = (q, k)
        self.heads = heads
        self._held = (q.rows.held, k.rows.held)
        q_rows, k_rows = q.weight.expand(heads[0], -1), k.weight.expand(heads[1], -1)
        self._weight = torch.cat((q_rows, k_rows))  # [heads + kv_heads, D]
        self._eps = eps
        self._shape = (q.weight.shape[0],)

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, qk: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        normed = F.rms_norm(qk, self._shape, None, self._eps)
        if self._held[0] or self._held[1]:
            q, k = (part.rows.weights_of(adapters) for part in self.parts)
            if q or k:
                return self._with_rows(normed, q, k)
        return normed.mul_(self._weight)

    def _with_rows(self, normed: torch.Tensor, q: Sequence[WeightedRows], k: Sequence[WeightedRows]) -> torch.Tensor:
        out = normed * self._weight
        num_q = self.heads[0]
        for heads, own in ((slice(0, num_q), q), (slice(num_q, None), k)):
            for one in own:
                weight = one.weight.unsqueeze(1) if one.is_gathered else one.weight
                torch.mul(normed[one.rows, heads], weight, out=out[one.rows, heads])
        return out
