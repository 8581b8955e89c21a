"""Mistral (Jiang et al. 2023): Llama with one sliding window over all layers."""

from __future__ import annotations

from loraplex.errors import UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.models.spec import DecoderSpec, FamilyParts, decoder_spec


def spec(config: ConfigFields) -> DecoderSpec:
    """Read a Mistral config; a null ``sliding_window`` is full attention, an absent one 4096 (transformers)."""
    types = set(config.texts("layer_types"))
    if len(types) > 1:
        raise UnsupportedFeature(f"mistral with mixed layer_types ({', '.join(sorted(types))}); supported is one kind")
    full = config.declares("sliding_window") and not config.has("sliding_window")
    window = None if full else config.integer("sliding_window", 4096)
    parts = FamilyParts(windows=(window,) * config.integer("num_hidden_layers"))
    return decoder_spec("MistralForCausalLM", config, parts)
