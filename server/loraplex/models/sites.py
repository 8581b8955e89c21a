"""The places an adapter can touch, described without any weight: what `lint` and the loader check against."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from loraplex.parallel.shard import REPLICATED, Cut, Part

#: the modules at both ends of a model, by the last part of their names; they are PEFT's EMBEDDING_LAYER_NAMES too
EMBEDDING: Final = "embed_tokens"
OUTPUT_HEAD: Final = "lm_head"
ENDS: Final = (EMBEDDING, OUTPUT_HEAD)


class SiteKind(enum.StrEnum):
    """What sort of module a site is."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    NORM = "norm"
    #: a causal convolution of each channel by itself; no adapter multiplies there, but its tensors may be saved
    CONV = "conv"
    #: a parameter that stands in its module by itself, a number for each head: A_log, D, dt_bias
    VECTOR = "vector"


@dataclass(frozen=True, slots=True)
class Site:
    """One adaptable module under its checkpoint name.

    ``in_features``/``out_features`` are the module's own: for an embedding, vocabulary size and hidden size; for a
    norm or a vector, both its length; for a convolution, the width of its kernel and its channels. ``cut`` is how ranks
    share its matrix ``[out, in]``; seen from tokens to features, that of an embedding is cut by its inputs.
    """

    name: str  # model.layers.0.self_attn.q_proj
    kind: SiteKind
    in_features: int
    out_features: int
    bias: bool = False
    cut: Cut = REPLICATED

    def part(self, rank: int, size: int) -> Part:
        """What ``rank`` of ``size`` holds of it. Raises UnsupportedFeature as ``Cut.part`` does."""
        return self.cut.part(self.out_features, self.in_features, rank, size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of its weight: ``[out, in]``; ``[vocab, hidden]`` of an embedding, ``[n]`` of a norm or a vector,
        ``[channels, 1, width]`` of a convolution."""
        match self.kind:
            case SiteKind.NORM | SiteKind.VECTOR:
                return (self.out_features,)
            case SiteKind.CONV:
                return (self.out_features, 1, self.in_features)
            case SiteKind.EMBEDDING:
                return (self.in_features, self.out_features)
            case SiteKind.LINEAR:
                return (self.out_features, self.in_features)

    @property
    def weight_key(self) -> str:
        """The name of its weight: a vector's is its own."""
        return self.name if self.kind is SiteKind.VECTOR else f"{self.name}.weight"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """What a dense checkpoint holds of it -> shapes."""
        weight = {self.weight_key: self.weight_shape}
        return weight | {f"{self.name}.bias": (self.out_features,)} if self.bias else weight

    @property
    def module(self) -> str:
        """The last part of the name: q_proj."""
        return self.name.rsplit(".", 1)[-1]
