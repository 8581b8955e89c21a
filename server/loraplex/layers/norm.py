"""Root-mean-square norms: over the hidden size, and over each head of packed queries and keys."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from loraplex.layers.rows import RowsTable
from loraplex_kernels.lora import StepPlan


class RMSNorm:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, ``[T, H]`` -> a new ``[T, H]``.

    Source: Zhang and Sennrich 2019, eq. 4; transformers' LlamaRMSNorm.
    """

    __slots__ = ("_eps", "_shape", "rows", "site", "weight")

    def __init__(self, site: str, weight: torch.Tensor, eps: float, rows: RowsTable) -> None:
        self.site = site
        self.weight = weight
        self.rows = rows
        self._eps = eps
        self._shape = (weight.shape[0],)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        return F.rms_norm(x, self._shape, self.weight, self._eps)


class HeadNorm:
    """Qwen3's query and key norms in one pass over ``[T, heads + kv_heads, D]``: each head over its own D values."""

    __slots__ = ("_eps", "_shape", "_weight", "heads", "parts")

    def __init__(self, q: RMSNorm, k: RMSNorm, heads: tuple[int, int], eps: float) -> None:
        """``q`` and ``k`` are the two norms by themselves; ``heads`` how many heads each serves."""
        self.parts = (q, k)
        self.heads = heads
        q_rows, k_rows = q.weight.expand(heads[0], -1), k.weight.expand(heads[1], -1)
        self._weight = torch.cat((q_rows, k_rows))  # [heads + kv_heads, D]
        self._eps = eps
        self._shape = (q.weight.shape[0],)

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, qk: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        return F.rms_norm(qk, self._shape, None, self._eps).mul_(self._weight)
