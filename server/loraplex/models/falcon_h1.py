"""Falcon-H1: a Mamba2 mixer and attention side by side in every layer, and constants that multiply most of it."""

from __future__ import annotations

from dataclasses import replace

from loraplex.json_config import ConfigFields
from loraplex.layers.attention import AttentionScales
from loraplex.models.mamba_config import HYBRID_KEYS, mamba_spec
from loraplex.models.mixers.attention import AttentionSpec
from loraplex.models.mixers.mamba import MambaMultipliers, MambaNorm, MambaSpec
from loraplex.models.mixers.mlp import MlpSpec
from loraplex.models.rope_config import rotary_spec
from loraplex.models.spec import BlockSpec, DecoderSpec, Factors, Names, activation_of, head_sizes

_KEYS = replace(HYBRID_KEYS, out_bias="projectors_bias")


def spec(config: ConfigFields) -> DecoderSpec:
    """Read a Falcon-H1 config."""
    hidden, eps = config.integer("hidden_size"), config.number("rms_norm_eps", 1e-5)
    heads, kv_heads, head_dim = head_sizes(config)
    bias = config.flag("attention_bias", False)
    attention = AttentionSpec(
        hidden,
        heads,
        kv_heads,
        head_dim,
        qkv_bias=bias,
        o_bias=bias,
        scales=AttentionScales(
            inputs=config.number("attention_in_multiplier", 1.0),
            keys=config.number("key_multiplier", 1.0),
            outputs=config.number("attention_out_multiplier", 1.0),
        ),
    )
    of_gate, of_output = config.numbers("mlp_multipliers", (1.0, 1.0))
    mlp = MlpSpec(
        hidden,
        config.integer("intermediate_size"),
        activation_of(config),
        name="feed_forward",
        bias=config.flag("mlp_bias", False),
        scales=(of_gate, of_output),
    )
    layer = (
        BlockSpec("input_layernorm", (_mamba(config, hidden, eps), attention)),
        BlockSpec("pre_ff_layernorm", (mlp,)),
    )
    max_position = config.integer("max_position_embeddings", 8192)
    return DecoderSpec(
        architecture="FalconH1ForCausalLM",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        max_position=max_position,
        norm_eps=eps,
        tied=config.flag("tie_word_embeddings", False),
        rotary=rotary_spec(config, head_dim, max_position),
        layers=(layer,) * config.integer("num_hidden_layers"),
        names=Names(norm="model.final_layernorm"),
        factors=Factors(config.number("embedding_multiplier", 1.0), config.number("lm_head_multiplier", 1.0)),
    )


def _mamba(config: ConfigFields, hidden: int, eps: float) -> MambaSpec:
    """Its inner width is a key of its own, and its norm may be left out."""
    norm = None
    if config.flag("mamba_rms_norm", False):
        norm = MambaNorm(eps, before_gate=config.flag("mamba_norm_before_gate", True))
    z, x, b, c, dt = config.numbers("ssm_multipliers", (1.0,) * 5)
    multipliers = MambaMultipliers(
        inputs=config.number("ssm_in_multiplier", 1.0),
        projected=(z, x, b, c, dt),
        outputs=config.number("ssm_out_multiplier", 1.0),
    )
    # a null is no absent key here: it says that the width follows from the hidden size
    given = config.has("mamba_d_ssm") or not config.declares("mamba_d_ssm")
    inner = config.integer("mamba_d_ssm", 1024) if given else None
    return replace(mamba_spec(config, _KEYS, hidden, norm, name="mamba", inner=inner), multipliers=multipliers)
