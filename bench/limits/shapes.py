"""A decoder's linear layers as sizes: what an adapter of all of them weighs, what a step of the base reads.

Knows no kernel and no hardware.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: factors and activations are bf16 or fp16, whatever the base's weights are
ELEMENT_BYTES = 2
#: sums between shrink and expand are float32
SUM_BYTES = 4


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """Projections that read the same input, and therefore share one table: q, k and v, or gate and up."""

    name: str
    in_features: int
    part_sizes: tuple[int, ...]

    @property
    def num_parts(self) -> int:
        return len(self.part_sizes)

    @property
    def out_features(self) -> int:
        return sum(self.part_sizes)

    def a_bytes(self, rank: int) -> int:
        """Bytes of all parts' A, each ``[rank, in]``."""
        return self.num_parts * rank * self.in_features * ELEMENT_BYTES

    def b_bytes(self, rank: int) -> int:
        """Bytes of all parts' B, each ``[out, rank]``."""
        return rank * self.out_features * ELEMENT_BYTES


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a Llama-like decoder, as in its config.json."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def packed_layers(self) -> tuple[PackedLayer, ...]:
        """The packed layers of one decoder layer."""
        hidden, heads = self.hidden_size, self.num_heads * self.head_dim
        kv = self.num_kv_heads * self.head_dim
        return (
            PackedLayer("qkv", hidden, (heads, kv, kv)),
            PackedLayer("o", heads, (hidden,)),
            PackedLayer("gate_up", hidden, (self.intermediate_size, self.intermediate_size)),
            PackedLayer("down", self.intermediate_size, (hidden,)),
        )

    @property
    def num_tables(self) -> int:
        return self.num_layers * len(self.packed_layers)

    def adapter_bytes(self, rank: int) -> int:
        """Bytes of one adapter on every linear layer."""
        return self.num_layers * sum(layer.a_bytes(rank) + layer.b_bytes(rank) for layer in self.packed_layers)

    @property
    def linear_weights(self) -> int:
        """Weights of the adaptable layers, in elements."""
        return self.num_layers * sum(layer.in_features * layer.out_features for layer in self.packed_layers)

    @property
    def head_weights(self) -> int:
        """Weights of the output head, in elements. The embedding is only looked up."""
        return self.hidden_size * self.vocab_size


def read_config(path: Path) -> ModelShape:
    """The shape in a ``config.json``. Raises ValueError naming the field that is missing or no positive integer."""
    config = json.loads(path.read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a {type(config).__name__}, must be an object of config fields")

    def size(field: str) -> int:
        return _size(config, field, path)

    heads = size("num_attention_heads")
    hidden = size("hidden_size")
    return ModelShape(
        name=path.parent.name or path.name,
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads") if "num_key_value_heads" in config else heads,
        head_dim=size("head_dim") if config.get("head_dim") else hidden // heads,
        vocab_size=size("vocab_size"),
    )


def _size(config: Mapping[str, object], field: str, path: Path) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {field} is {value!r}, must be a positive integer")
    return value


LLAMA_8B = ModelShape(
    name="Llama-3.1-8B",
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)
