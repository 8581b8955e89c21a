"""Llama (Touvron et al. 2023; Llama 2, 3, SmolLM2): the plain skeleton, with optional biases."""

from __future__ import annotations

from loraplex.json_config import ConfigFields
from loraplex.models.spec import DecoderSpec, FamilyParts, decoder_spec, full_attention


def spec(config: ConfigFields) -> DecoderSpec:
    """Read a Llama config."""
    attention_bias = config.flag("attention_bias", False)
    parts = FamilyParts(
        windows=full_attention(config),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
    )
    return decoder_spec("LlamaForCausalLM", config, parts)
