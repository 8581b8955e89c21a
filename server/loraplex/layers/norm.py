"""Root-mean-square norms: over the hidden size, and over each head of packed queries and keys."""

from __future__ import annotations

import torch
from torch.nn import functional as F


class RMSNorm:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, ``[T, H]`` -> a new ``[T, H]``.

    Source: Zhang and Sennrich 2019, eq. 4; transformers' LlamaRMSNorm.
    """

    __slots__ = ("_eps", "_shape", "_weight")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps
        self._shape = (weight.shape[0],)

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self._shape, self._weight, self._eps)


class HeadNorm:
    """Qwen3's query and key norms in one pass over ``[T, heads + kv_heads, D]``: each head over its own D values."""

    __slots__ = ("_eps", "_shape", "_weight")

    def __init__(self, q_weight: torch.Tensor, k_weight: torch.Tensor, heads: tuple[int, int], eps: float) -> None:
        q_rows, k_rows = q_weight.expand(heads[0], -1), k_weight.expand(heads[1], -1)
        self._weight = torch.cat((q_rows, k_rows))  # [heads + kv_heads, D]
        self._eps = eps
        self._shape = (q_weight.shape[0],)

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, qk: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(qk, self._shape, None, self._eps).mul_(self._weight)
