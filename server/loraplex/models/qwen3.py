"""Qwen3 (dense): norms on every query and key head, heads of their own size, optional biases."""

from __future__ import annotations

from loraplex.json_config import ConfigFields
from loraplex.models.spec import DecoderSpec, FamilyParts, decoder_spec, qwen_windows


def spec(config: ConfigFields) -> DecoderSpec:
    """Read a Qwen3 config; an absent ``head_dim`` is 128, whatever the hidden size (transformers' Qwen3Config)."""
    attention_bias = config.flag("attention_bias", False)
    parts = FamilyParts(
        windows=qwen_windows(config),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        default_head_dim=128,
    )
    return decoder_spec("Qwen3ForCausalLM", config, parts)
