"""The adapter algebra: what every adapter kind is lowered to, once, at load.

Linear site::

    y = W x + sum_t c_t * scale_t * B_t (A_t x)

Embedding site: the same with x one-hot, so ``A x`` is a column of A. Kernels, parallelism and merging read this form
alone and never hear the kind's name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.types import Coverage


@dataclass(frozen=True, slots=True)
class SiteDelta:
    """What one adapter adds at one site. A: ``[r, in]``, B: ``[out, r]``, both on the host."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def scaled_b(self) -> torch.Tensor:
        """``scale * B`` rounded once to B's dtype: ``[out, r]``."""
        return (self.b.float() * self.scale).to(self.b.dtype)

    def dense_delta(self) -> torch.Tensor:
        """The float32 matrix ``[out, in]`` this site adds to W."""
        return self.scale * (self.b.float() @ self.a.float())


@dataclass(frozen=True, slots=True)
class AdapterDelta:
    """A whole adapter, lowered: site name (``model.layers.0.self_attn.q_proj``) -> delta."""

    uid: str
    kind: str
    sites: dict[str, SiteDelta]
    coverage: Coverage

    @property
    def max_rank(self) -> int:
        return max(delta.rank for delta in self.sites.values())

    @property
    def nbytes(self) -> int:
        return sum(delta.nbytes for delta in self.sites.values())

    @property
    def num_parameters(self) -> int:
        return sum(delta.a.numel() + delta.b.numel() for delta in self.sites.values())
