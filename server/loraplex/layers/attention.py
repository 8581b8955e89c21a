"""Self-attention of one layer: projections, optional head norms and rotation, the paged attention op, output.

Does not know how keys and values are paged, nor which rows belong to which sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.layers.linear import Linear
from loraplex.layers.norm import HeadNorm
from loraplex.layers.rotary import rotate
from loraplex.layers.step import LayerStep
from loraplex_kernels.attention import AttentionBackend


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's attention geometry on this rank; ``layer`` counts the layers that attend. ``window`` counts the
    positions a query sees, itself included."""

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


@dataclass(frozen=True, slots=True)
class AttentionScales:
    """Constants of a family: of the scores (None: one over the root of the head's size), of the layer's input, of its
    keys, of its output."""

    scores: float | None = None
    inputs: float = 1.0
    keys: float = 1.0
    outputs: float = 1.0


class Attention:
    """``[T, H]`` -> ``[T, H]``; writes this step's keys and values into the layer's pages."""

    __slots__ = ("_attend", "_heads", "_norm", "_o", "_qk_heads", "_qkv", "_rotates", "_scale", "_scales", "_shape")

    def __init__(self, heads: Heads, parts: AttentionParts, scales: AttentionScales, *, rotates: bool) -> None:
        self._rotates = rotates
        self._heads = heads
        self._qkv = parts.qkv
        self._norm = parts.qk_norm
        self._o = parts.o
        self._attend = parts.backend.attend
        self._scales = scales
        self._scale = heads.head_dim**-0.5 if scales.scores is None else scales.scores
        self._qk_heads = heads.heads + heads.kv_heads
        self._shape = (-1, heads.heads + 2 * heads.kv_heads, heads.head_dim)

    def __call__(self, x: torch.Tensor, step: LayerStep) -> torch.Tensor:
        heads, scales = self._heads, self._scales
        assert step.attention is not None, "a step without attention"
        assert step.kv_cache is not None, "a step without a cache"
        if scales.inputs != 1.0:
            x = x * scales.inputs
        qkv = self._qkv(x, step.adapters).view(self._shape)  # [T, heads + 2 kv_heads, D]
        qk, v = qkv[:, : self._qk_heads], qkv[:, self._qk_heads :]
        if scales.keys != 1.0:
            qk[:, heads.heads :] *= scales.keys
        if self._norm is not None:
            qk = self._norm(qk, step.adapters)
        if self._rotates:
            assert step.rotation is not None, "a step without a rotation"
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
        y = self._o(out, step.adapters)
        return y if scales.outputs == 1.0 else y.mul_(scales.outputs)
