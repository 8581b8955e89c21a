"""GraniteMoeHybrid (Granite 4) without routed experts: Mamba2 layers, some of attention, a feed-forward block in each.

Constants of the family multiply the embedding, every block's change, the scores and, as a divisor, the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from loraplex.errors import UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.layers.attention import AttentionScales
from loraplex.models.mamba_config import HYBRID_KEYS, mamba_spec
from loraplex.models.mixers.attention import AttentionSpec
from loraplex.models.mixers.base import MixerSpec
from loraplex.models.mixers.mamba import MambaNorm
from loraplex.models.mixers.mlp import MlpSpec
from loraplex.models.rope_config import rotary_spec
from loraplex.models.spec import BlockSpec, DecoderSpec, Factors, activation_of, head_sizes

#: a layer's kind, as transformers 5 and 4 spell it
_KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "linear_attention": "mamba",
        "mamba": "mamba",
        "full_attention": "attention",
        "attention": "attention",
    }
)


def spec(config: ConfigFields) -> DecoderSpec:
    """Read a GraniteMoeHybrid config. Raises UnsupportedFeature for routed experts."""
    experts = config.integer("num_local_experts", 8, minimum=0)
    if experts:
        raise UnsupportedFeature(
            f"num_local_experts {experts}: routed experts are not served; supported is 0, dense blocks alone",
            field="num_local_experts",
        )
    hidden, eps = config.integer("hidden_size"), config.number("rms_norm_eps", 1e-6)
    heads, kv_heads, head_dim = head_sizes(config)
    bias = config.flag("attention_bias", False)
    rotates = _rotates(config)
    attention = AttentionSpec(
        hidden,
        heads,
        kv_heads,
        head_dim,
        qkv_bias=bias,
        o_bias=bias,
        rotates=rotates,
        scales=AttentionScales(scores=config.number("attention_multiplier", 1.0)),
    )
    mixers: dict[str, MixerSpec] = {
        "attention": attention,
        "mamba": mamba_spec(config, HYBRID_KEYS, hidden, MambaNorm(eps), name="mamba"),
    }
    mlp = MlpSpec(
        hidden,
        config.integer("shared_intermediate_size", 1024),
        activation_of(config),
        name="shared_mlp",
        up=("input_linear",),
        down="output_linear",
        packed=True,
        what="shared_intermediate_size",
    )
    scale = config.number("residual_multiplier", 1.0)
    max_position = config.integer("max_position_embeddings", 2048)
    return DecoderSpec(
        architecture="GraniteMoeHybridForCausalLM",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        max_position=max_position,
        norm_eps=eps,
        tied=config.flag("tie_word_embeddings", False),
        rotary=rotary_spec(config, head_dim, max_position) if rotates else None,
        layers=tuple(
            (
                BlockSpec("input_layernorm", (mixers[kind],), scale),
                BlockSpec("post_attention_layernorm", (mlp,), scale),
            )
            for kind in _kinds(config)
        ),
        factors=Factors(config.number("embedding_multiplier", 1.0), 1.0 / config.number("logits_scaling", 1.0)),
    )


def _rotates(config: ConfigFields) -> bool:
    kind = config.value("position_embedding_type")
    if kind not in (None, "nope", "rope"):
        raise UnsupportedFeature(
            f"position_embedding_type {kind!r}; supported are rope, nope and none", field="position_embedding_type"
        )
    return kind == "rope"


def _kinds(config: ConfigFields) -> tuple[str, ...]:
    """Of every layer; without a list of them, all are Mamba2's."""
    num_layers = config.integer("num_hidden_layers")
    key = "layer_types" if config.has("layer_types") else "layers_block_type"
    spelt = config.texts(key) or ("linear_attention",) * num_layers
    if len(spelt) != num_layers:
        config.refuse(key, f"one entry for each of num_hidden_layers = {num_layers}")
    for one in spelt:
        if one not in _KINDS:
            raise UnsupportedFeature(f"{key} has {one!r}; supported are linear_attention, full_attention", field=key)
    return tuple(_KINDS[one] for one in spelt)
