"""config.json: strict reading, both generations of spelling, sites without weights, refusals by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loraplex.errors import InvalidModel, LoraplexError, NotFound, UnsupportedFeature
from loraplex.json_config import MAX_CONFIG_BYTES, read_config
from loraplex.layers.rotary import attention_magnitude, inverse_frequencies
from loraplex.models.registry import describe, read_spec
from loraplex.models.sites import SiteKind
from tests.tiny import load_tiny, tiny_checkpoint

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}

ROPES: dict[str, dict[str, object]] = {
    "default": {},
    "theta": {"rope_theta": 500000.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 1e5},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "head_dim": 64,
    },
    "yarn": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "rope_theta": 1e6,
        "head_dim": 128,
    },
    "yarn-5": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
        "head_dim": 64,
    },
    "yarn-mscale": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "original_max_position_embeddings": 128,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
        }
    },
    "yarn-attention-factor": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
            "attention_factor": 1.25,
        }
    },
}


@pytest.mark.parametrize("name", list(ROPES))
def test_frequencies_equal_transformers(name: str) -> None:
    config = {**LLAMA, **ROPES[name]}
    spec = read_spec(config).rotary
    theirs = AutoConfig.for_model("llama", **{k: v for k, v in config.items() if k != "model_type"})
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        theta = theirs.rope_parameters["rope_theta"]
        expected, magnitude = 1.0 / theta ** (torch.arange(0, spec.head_dim, 2).float() / spec.head_dim), 1.0
    else:
        expected, magnitude = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    assert torch.equal(inverse_frequencies(spec), expected)
    assert attention_magnitude(spec) == magnitude


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_sites_need_no_weights(arch: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), arch, tie_word_embeddings=True)
    sites = describe(read_config(checkpoint))
    assert sites == load_tiny(checkpoint).sites()
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    modules = {
        name: (module.in_features, module.out_features)
        for name, module in theirs.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert {s.name: (s.in_features, s.out_features) for s in sites if s.kind is SiteKind.LINEAR} == modules
    assert [s.name for s in sites if s.kind is SiteKind.EMBEDDING] == ["model.embed_tokens"]
    assert (sites[0].in_features, sites[0].out_features) == (96, 32)


def test_model_type_stands_in_for_architectures() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert read_spec(config).architecture == "LlamaForCausalLM"


def test_old_and_new_spelling_agree() -> None:
    old = {**LLAMA, "rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}}
    assert read_spec(old) == read_spec(new)


REFUSALS: dict[str, tuple[dict[str, object], type[LoraplexError], str]] = {
    "unknown architecture": ({"architectures": ["MambaForCausalLM"]}, UnsupportedFeature, "MambaForCausalLM.*Qwen3"),
    "missing key": ({"hidden_size": None}, InvalidModel, "hidden_size is missing"),
    "a string": ({"num_hidden_layers": "2"}, InvalidModel, "num_hidden_layers is '2'"),
    "a bool for an int": ({"vocab_size": True}, InvalidModel, "vocab_size is True"),
    "zero": ({"intermediate_size": 0}, InvalidModel, "intermediate_size is 0"),
    "a negative epsilon": ({"rms_norm_eps": -1e-5}, InvalidModel, "rms_norm_eps is -1e-05"),
    "groups": ({"num_key_value_heads": 3}, InvalidModel, "num_key_value_heads is 3, expected a divisor"),
    "heads": ({"num_attention_heads": 5, "num_key_value_heads": 5}, InvalidModel, "hidden_size is 32"),
    "odd head_dim": ({"head_dim": 7}, InvalidModel, "head_dim is 7"),
    "activation": ({"hidden_act": "mish"}, UnsupportedFeature, "hidden_act 'mish'"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, UnsupportedFeature, "'dynamic'"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope"}}, UnsupportedFeature, "'longrope'"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, InvalidModel, "rope_scaling.factor is missing"),
    "a section of another kind": ({"rope_scaling": 3}, InvalidModel, "rope_scaling is 3"),
    "llama3 bands": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        InvalidModel,
        "high_freq_factor is 4.0",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, UnsupportedFeature, "partial_rotary_factor 0.5"),
    "rope by layer type": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        UnsupportedFeature,
        "full_attention",
    ),
    "layer types": (
        {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]},
        InvalidModel,
        "layer_types.*num_hidden_layers = 2",
    ),
    "chunked layers": (
        {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention", "chunked_attention"]},
        UnsupportedFeature,
        "chunked_attention",
    ),
    "sliding without a window": (
        {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention", "sliding_attention"]},
        InvalidModel,
        "use_sliding_window",
    ),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_refusals_name_key_and_value(case: str) -> None:
    change, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        read_spec({**LLAMA, **change})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds a list"),
        ("{", "not strict JSON"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": 1e999}', "out of range"),
        ("\xff", "not strict JSON"),
        ("[" * 100_000, "not strict JSON"),
        (" " * (MAX_CONFIG_BYTES + 1), "larger than"),
    ],
    ids=["list", "cut", "twice", "nan", "huge", "bytes", "deep", "long"],
)
def test_config_that_is_no_json_object(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidModel, match=message):
        read_config(tmp_path)


def test_no_config_and_no_directory(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"config\.json.*cannot be read"):
        read_config(tmp_path)
    with pytest.raises(NotFound, match="nowhere"):
        read_config(tmp_path / "nowhere")


def test_defaults_are_transformers_own(tmp_path: Path) -> None:
    """An absent window is 4096 in Mistral, a null one none; an absent head_dim is 128 in Qwen3."""
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert _windows(mistral) == (4096, 4096)
    assert _windows({**mistral, "sliding_window": None}) == (None, None)
    assert read_spec({**LLAMA, "architectures": ["Qwen3ForCausalLM"]}).attentions[0].head_dim == 128
    (tmp_path / "config.json").write_text(json.dumps(mistral))
    assert _windows(read_config(tmp_path)) == (4096, 4096)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("slides", "first"), [(True, 0), (True, 1), (True, 2), (False, 0)])
def test_sliding_layers_without_layer_types(arch: str, slides: bool, first: int) -> None:
    """transformers writes ``layer_types`` into what it saves; older files have ``max_window_layers`` alone."""
    change = {"use_sliding_window": slides, "sliding_window": 7, "max_window_layers": first}
    theirs = AutoConfig.for_model(arch, **{k: v for k, v in {**LLAMA, **change}.items() if k != "model_type"})
    expected = tuple(7 if kind == "sliding_attention" else None for kind in theirs.layer_types)
    architecture = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[arch]
    assert _windows({**LLAMA, **change, "architectures": [architecture]}) == expected


def _windows(config: dict[str, object]) -> tuple[int | None, ...]:
    return tuple(attention.window for attention in read_spec(config).attentions)
