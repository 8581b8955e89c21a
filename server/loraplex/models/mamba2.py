"""Mamba2 (Dao and Gu 2024): layers of one mixer each, without attention; as transformers writes it (Codestral Mamba),
and as state-spaces' own checkpoints do."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from loraplex.errors import UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.models.mamba_config import MambaKeys, mamba_spec
from loraplex.models.mixers.mamba import MambaNorm
from loraplex.models.spec import BlockSpec, DecoderSpec, Names

_KEYS = MambaKeys(
    heads="num_heads",
    head_dim="head_dim",
    state_size="state_size",
    groups="n_groups",
    conv_width="conv_kernel",
    expand="expand",
    chunk_size="chunk_size",
    in_bias="use_bias",
    out_bias="use_bias",
    conv_bias="use_conv_bias",
    activation="hidden_act",
    time_step_limit="time_step_limit",
    defaults=MappingProxyType({"num_heads": 128, "head_dim": 64, "state_size": 128, "n_groups": 8, "chunk_size": 256}),
)
#: of state-spaces' ssm_cfg; those that only say how weights were drawn are passed over
_SSM_KEYS = frozenset(
    {
        *("layer", "headdim", "expand", "d_state", "ngroups", "d_conv", "chunk_size", "bias", "conv_bias", "dt_limit"),
        *("dt_min", "dt_max", "dt_init_floor", "A_init_range", "conv_init", "use_mem_eff_path"),
    }
)
#: positions are not encoded: what a server without --max-model-len plans for
_MAX_POSITION = 1 << 18


def spec(config: ConfigFields) -> DecoderSpec:
    """Read a Mamba2 config. Defaults are transformers' Mamba2Config's."""
    if config.has("ssm_cfg"):
        return _state_spaces(config)
    hidden, eps = config.integer("hidden_size", 4096), config.number("layer_norm_epsilon", 1e-5)
    mixer = mamba_spec(config, _KEYS, hidden, MambaNorm(eps))
    return DecoderSpec(
        architecture="Mamba2ForCausalLM",
        vocab_size=config.integer("vocab_size", 32768),
        hidden_size=hidden,
        max_position=config.integer("max_position_embeddings", _MAX_POSITION),
        norm_eps=eps,
        tied=config.flag("tie_word_embeddings", False),
        rotary=None,
        layers=((BlockSpec("norm", (mixer,)),),) * config.integer("num_hidden_layers", 64),
        names=_names("embeddings"),
        residual_in_float32=config.flag("residual_in_fp32", True),
    )


def _names(embed: str) -> Names:
    """The embedding is ``embedding`` in state-spaces' code, ``embeddings`` in transformers, which reads either."""
    other = "embedding" if embed == "embeddings" else "embeddings"
    aliases = ((f"backbone.{other}.", f"backbone.{embed}."),)
    return Names(embed=f"backbone.{embed}", layers="backbone.layers", norm="backbone.norm_f", aliases=aliases)


def _state_spaces(config: ConfigFields) -> DecoderSpec:
    """state-spaces/mamba MambaConfig and modules/mamba2.py; sizes that are not there are those of its Mamba2."""
    inside = config.section("ssm_cfg") or ConfigFields({})
    layer = inside.text("layer", "Mamba1")
    others = {"attn_layer_idx": config.value("attn_layer_idx"), "d_intermediate": config.value("d_intermediate")}
    if layer != "Mamba2" or any(others.values()) or not config.flag("rms_norm", True):
        raise UnsupportedFeature(
            f"ssm_cfg.layer {layer!r}, {', '.join(f'{key} {value!r}' for key, value in others.items())}, rms_norm "
            f"{config.value('rms_norm')!r}; supported are layers Mamba2 alone, with rms_norm",
            field="ssm_cfg",
        )
    unknown = sorted(set(inside.keys()) - _SSM_KEYS)
    if unknown:
        raise UnsupportedFeature(
            f"ssm_cfg has {', '.join(unknown)}; supported are {', '.join(sorted(_SSM_KEYS))}", field="ssm_cfg"
        )
    hidden = config.integer("d_model")
    head_dim, expand = inside.integer("headdim", 64), inside.integer("expand", 2)
    vocab, multiple = config.integer("vocab_size"), config.integer("pad_vocab_size_multiple", 8)
    values: Mapping[str, object] = {
        "num_heads": hidden * expand // head_dim,
        "head_dim": head_dim,
        "expand": expand,
        "state_size": inside.integer("d_state", 128),
        "n_groups": inside.integer("ngroups", 1),
        "conv_kernel": inside.integer("d_conv", 4),
        "chunk_size": inside.integer("chunk_size", 256),
        "use_bias": inside.flag("bias", False),
        "use_conv_bias": inside.flag("conv_bias", True),
        "time_step_limit": inside.value("dt_limit"),
    }
    mixer = mamba_spec(ConfigFields(values, "ssm_cfg: "), _KEYS, hidden, MambaNorm(1e-5))
    return DecoderSpec(
        architecture="Mamba2ForCausalLM",
        vocab_size=-(-vocab // multiple) * multiple,
        hidden_size=hidden,
        max_position=_MAX_POSITION,
        norm_eps=1e-5,
        tied=config.flag("tie_embeddings", True),
        rotary=None,
        layers=((BlockSpec("norm", (mixer,)),),) * config.integer("n_layer"),
        names=_names("embedding"),
        residual_in_float32=config.flag("residual_in_fp32", True),
    )
