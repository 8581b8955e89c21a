"""Nemotron-H: one mixer a layer, of Mamba2, attention without rotation, or a plain feed-forward block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from loraplex.errors import UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.models.mamba_config import MambaKeys, mamba_spec
from loraplex.models.mixers.attention import AttentionSpec
from loraplex.models.mixers.base import MixerSpec
from loraplex.models.mixers.mamba import MambaNorm, MambaSpec
from loraplex.models.mixers.mlp import MlpSpec
from loraplex.models.spec import BlockSpec, DecoderSpec, Names, activation_of

_KEYS = MambaKeys(
    heads="mamba_num_heads",
    head_dim="mamba_head_dim",
    state_size="ssm_state_size",
    groups="n_groups",
    conv_width="conv_kernel",
    expand="",
    chunk_size="chunk_size",
    in_bias="use_bias",
    out_bias="use_bias",
    conv_bias="use_conv_bias",
    activation="mamba_hidden_act",
    time_step_limit="",
    defaults=MappingProxyType(
        {"mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "chunk_size": 128}
    ),
)
#: how older configs spell keys (transformers' NemotronHConfig)
_OLD_KEYS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "n_groups": "mamba_n_groups",
        "conv_kernel": "mamba_d_conv",
        "time_step_min": "mamba_dt_min",
        "use_conv_bias": "mamba_conv_bias",
        "chunk_size": "mamba_chunk_size",
    }
)
#: a layer's kind, as it may be spelt: in a list, and in the pattern of older configs
_KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "linear_attention": "mamba",
        "mamba": "mamba",
        "M": "mamba",
        "full_attention": "attention",
        "attention": "attention",
        "*": "attention",
        "mlp": "mlp",
        "-": "mlp",
        "moe": "moe",
        "E": "moe",
    }
)


def spec(config: ConfigFields) -> DecoderSpec:
    """Read a Nemotron-H config. Raises UnsupportedFeature for layers of routed experts."""
    hidden, eps = config.integer("hidden_size", 4096), config.number("layer_norm_epsilon", 1e-5)
    heads, kv_heads = config.integer("num_attention_heads", 32), config.integer("num_key_value_heads", 8)
    if heads % kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    mixers: dict[str, MixerSpec] = {
        "mamba": _mamba(config, hidden, eps),
        "attention": AttentionSpec(
            hidden, heads, kv_heads, config.integer("head_dim", 128), name="mixer", rotates=False
        ),
        "mlp": MlpSpec(
            hidden,
            config.integer("intermediate_size", 21504),
            activation_of(config, "mlp_hidden_act", "relu2"),
            name="mixer",
            up=("up_proj",),
            bias=config.flag("mlp_bias", False),
        ),
    }
    return DecoderSpec(
        architecture="NemotronHForCausalLM",
        vocab_size=config.integer("vocab_size", 131072),
        hidden_size=hidden,
        max_position=config.integer("max_position_embeddings", 4096),
        norm_eps=eps,
        tied=False,  # whatever the config says: transformers ties nothing here
        rotary=None,
        layers=tuple((BlockSpec("norm", (mixers[kind],)),) for kind in _kinds(config)),
        names=Names(
            embed="model.embeddings",
            norm="model.norm_f",
            aliases=(("backbone.", "model."),),  # checkpoints, and adapters made with NVIDIA's own model code
        ),
    )


def _mamba(config: ConfigFields, hidden: int, eps: float) -> MambaSpec:
    """Time steps of a prompt are never below ``time_step_min``."""
    renamed = config.renamed({old: new for new, old in _OLD_KEYS.items()})
    mamba = mamba_spec(renamed, _KEYS, hidden, MambaNorm(eps))
    return replace(mamba, limits=(renamed.number("time_step_min", 0.001), math.inf))


def _kinds(config: ConfigFields) -> tuple[str, ...]:
    """Of every layer. Raises UnsupportedFeature for one that is not there, or of routed experts."""
    key = "layers_block_type" if config.has("layers_block_type") else "hybrid_override_pattern"
    spelt = config.texts(key) if key == "layers_block_type" else tuple(config.text(key))
    kinds = tuple(_KINDS.get(one, one) for one in spelt)
    served = ("mamba", "attention", "mlp")
    unknown = next((one for one, kind in zip(spelt, kinds, strict=True) if kind not in served), None)
    if unknown is not None:
        what = "layers of routed experts" if _KINDS.get(unknown) == "moe" else "a kind of layer"
        raise UnsupportedFeature(
            f"{key} has {unknown!r}, {what} that is not served; supported are linear_attention, full_attention, mlp",
            field=key,
        )
    return kinds
