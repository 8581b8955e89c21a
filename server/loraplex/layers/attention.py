"""Self-attention of one layer: projections, optional head norms, rotation, the paged attention op, output.

Does not know how keys and values are paged, nor which rows belong to which sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.layers.linear import Linear
from loraplex.layers.norm import HeadNorm
from loraplex.layers.rotary import Rotation, rotate
from loraplex_kernels.attention import AttentionBackend, AttentionPlan, KVCache
from loraplex_kernels.lora import StepPlan


@dataclass(frozen=True, slots=True)
class LayerStep:
    """What every layer of one step shares."""

    adapters: StepPlan
    rotation: Rotation
    attention: AttentionPlan
    kv_cache: KVCache


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's attention geometry on this rank. ``window`` counts the positions a query sees, itself included."""

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True, slots=True)
class AttentionParts:
    """The pieces attention is made of."""

    qkv: Linear
    qk_norm: HeadNorm | None
    o: Linear
    backend: AttentionBackend


class Attention:
    """``[T, H]`` -> ``[T, H]``; writes this step's keys and values into the layer's pages."""

    __slots__ = ("_attend", "_heads", "_norm", "_o", "_qk_heads", "_qkv", "_scale", "_shape")

    def __init__(self, heads: Heads, parts: AttentionParts) -> None:
        self._heads = heads
        self._qkv = parts.qkv
        self._norm = parts.qk_norm
        self._o = parts.o
        self._attend = parts.backend.attend
        self._scale = heads.head_dim**-0.5
        self._qk_heads = heads.heads + heads.kv_heads
        self._shape = (-1, heads.heads + 2 * heads.kv_heads, heads.head_dim)

    def __call__(self, x: torch.Tensor, step: LayerStep) -> torch.Tensor:
        heads = self._heads
        qkv = self._qkv(x, step.adapters).view(self._shape)  # [T, heads + 2 kv_heads, D]
        qk, v = qkv[:, : self._qk_heads], qkv[:, self._qk_heads :]
        if self._norm is not None:
            qk = self._norm(qk, step.adapters)
        qk = rotate(qk, step.rotation)
        out = self._attend(
            qk[:, : heads.heads],
            qk[:, heads.heads :],
            v,
            layer=heads.layer,
            cache=step.kv_cache,
            plan=step.attention,
            scale=self._scale,
            window=heads.window,
        )
        return self._o(out, step.adapters)
