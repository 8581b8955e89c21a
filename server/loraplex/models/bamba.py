"""Bamba: Mamba2 layers with some of attention among them, a gated feed-forward block in each."""

from __future__ import annotations

from loraplex.json_config import ConfigFields
from loraplex.models.mamba_config import HYBRID_KEYS, mamba_spec
from loraplex.models.mixers.attention import AttentionSpec
from loraplex.models.mixers.base import MixerSpec
from loraplex.models.mixers.mamba import MambaNorm
from loraplex.models.mixers.mlp import MlpSpec
from loraplex.models.rope_config import rotary_spec
from loraplex.models.spec import BlockSpec, DecoderSpec, Names, activation_of, head_sizes

#: of each head's dimensions, where the config does not say how many are rotated (transformers' BambaConfig)
_ROTATED = 0.5


def spec(config: ConfigFields) -> DecoderSpec:
    """Read a Bamba config."""
    hidden, eps = config.integer("hidden_size"), config.number("rms_norm_eps", 1e-5)
    heads, kv_heads, head_dim = head_sizes(config)
    bias = config.flag("attention_bias", False)
    attention = AttentionSpec(hidden, heads, kv_heads, head_dim, qkv_bias=bias, o_bias=bias)
    mamba = mamba_spec(config, HYBRID_KEYS, hidden, MambaNorm(eps), name="mamba")
    mlp = MlpSpec(
        hidden,
        config.integer("intermediate_size"),
        activation_of(config),
        name="feed_forward",
        bias=config.flag("mlp_bias", False),
    )
    num_layers = config.integer("num_hidden_layers")
    attended = config.integers("attn_layer_indices", minimum=0)
    if any(index >= num_layers for index in attended):
        config.refuse("attn_layer_indices", f"layers below num_hidden_layers = {num_layers}")

    def layer(index: int) -> tuple[BlockSpec, BlockSpec]:
        mixer: MixerSpec = attention if index in attended else mamba
        return BlockSpec("input_layernorm", (mixer,)), BlockSpec("pre_ff_layernorm", (mlp,))

    max_position = config.integer("max_position_embeddings", 262144)
    return DecoderSpec(
        architecture="BambaForCausalLM",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        max_position=max_position,
        norm_eps=eps,
        tied=config.flag("tie_word_embeddings", False),
        rotary=rotary_spec(config, head_dim, max_position, rotated=_ROTATED),
        layers=tuple(map(layer, range(num_layers))),
        names=Names(norm="model.final_layernorm"),
    )
