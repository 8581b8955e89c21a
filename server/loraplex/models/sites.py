"""The places an adapter can touch, described without any weight: what `lint` and the loader check against."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from loraplex.parallel.shard import REPLICATED, Cut, Part

EMBEDDING: Final = "embed_tokens"
#: the output head, by the last part of its name in every model here
OUTPUT_HEAD: Final = "lm_head"
#: PEFT's EMBEDDING_LAYER_NAMES: what it knows the ends of a vocabulary by. The embedding of some models has another
#: name; whether a site is an end is ``Site.is_end``
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
    def rows_shape(self) -> tuple[int, ...]:
        """Of an adapter's own rows, when it has all: the weight's, ``[channels, width]`` of a convolution."""
        return (self.out_features, self.in_features) if self.kind is SiteKind.CONV else self.weight_shape

    @property
    def has_matrix(self) -> bool:
        """Whether adapters may do more than take its weight's place."""
        return self.kind in (SiteKind.LINEAR, SiteKind.EMBEDDING)

    @property
    def is_head(self) -> bool:
        return self.module == OUTPUT_HEAD

    @property
    def is_end(self) -> bool:
        """Whether it stands at an end of the vocabulary: the embedding, or the head."""
        return self.kind is SiteKind.EMBEDDING or self.is_head

    @property
    def outputs(self) -> str:
        """What its outputs are, for people, where they are several things: ``z 48, x 48, B 6``; else nothing."""
        return ", ".join(f"{one.name} {one.features}".strip() for one in self.cut.stretches)

    @property
    def module(self) -> str:
        """The last part of the name: q_proj."""
        return self.name.rsplit(".", 1)[-1]
