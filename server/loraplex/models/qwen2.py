"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and sliding windows in upper layers."""

from __future__ import annotations

from loraplex.json_config import ConfigFields
from loraplex.models.spec import DecoderSpec, FamilyParts, decoder_spec, qwen_windows


def spec(config: ConfigFields) -> DecoderSpec:
    """Read a Qwen2 config."""
    return decoder_spec("Qwen2ForCausalLM", config, FamilyParts(windows=qwen_windows(config), qkv_bias=True))
