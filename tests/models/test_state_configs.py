"""Configurations of state-space families: what is refused and how it is named, and spellings that mean the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.errors import InvalidModel, LoraplexError, UnsupportedFeature
from loraplex.json_config import read_config
from loraplex.models.registry import read_spec
from tests.tiny import (
    CONFIGS,
    DIMENSIONS,
    STATE_DIMENSIONS,
    Chunk,
    PackedRunner,
    load_tiny,
    oracle,
    prompt,
    tiny_checkpoint,
)

STATE_SPACES = {
    "d_model": 32,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 93,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "ngroups": 2, "d_state": 16},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}

REFUSALS: dict[str, tuple[str, dict[str, object], type[LoraplexError], str]] = {
    "width": ("mamba2", {"num_heads": 7}, InvalidModel, "head_dim is 8, expected 64 / num_heads = 9.14"),
    "groups": ("mamba2", {"n_groups": 3}, InvalidModel, "n_groups is 3, expected a divisor of num_heads = 8"),
    "activation": ("mamba2", {"hidden_act": "gelu"}, UnsupportedFeature, "hidden_act 'gelu'.*silu"),
    "no chunk": ("mamba2", {"chunk_size": 0}, InvalidModel, "chunk_size is 0, expected an integer of at least 1"),
    "half a chunk": ("mamba2", {"chunk_size": 1.5}, InvalidModel, "chunk_size is 1.5"),
    "kernel": ("mamba2", {"conv_kernel": 1}, InvalidModel, "conv_kernel is 1, expected at least 2"),
    "no state": ("mamba2", {"state_size": 0}, InvalidModel, "state_size is 0"),
    "limits": ("mamba2", {"time_step_limit": [0.5, 0.1]}, InvalidModel, r"time_step_limit is \[0.5, 0.1\]"),
    "a limit": ("mamba2", {"time_step_limit": 0.5}, InvalidModel, "time_step_limit is 0.5, expected two numbers"),
    "a word for a limit": ("mamba2", {"time_step_limit": [0, "inf"]}, InvalidModel, "time_step_limit"),
    "infinite": ("mamba2", {"layer_norm_epsilon": float("inf")}, InvalidModel, "layer_norm_epsilon is inf"),
    "automatic heads": ("bamba", {"mamba_d_head": "auto", "mamba_n_heads": 7}, InvalidModel, "mamba_n_heads is 7"),
    "a layer too many": (
        "bamba",
        {"attn_layer_indices": [5]},
        InvalidModel,
        "attn_layer_indices.*num_hidden_layers = 3",
    ),
    "odd rotation": (
        "bamba",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.9}},
        InvalidModel,
        "partial_rotary_factor 0.9 of head_dim 8 rotates 7",
    ),
    "inner width": (
        "falcon_h1",
        {"mamba_d_ssm": 72},
        InvalidModel,
        "mamba_d_head is 8, expected 72 / mamba_n_heads = 9",
    ),
    "multipliers": ("falcon_h1", {"ssm_multipliers": [1.0, 2.0]}, InvalidModel, "ssm_multipliers.*a list of 5 numbers"),
    "experts": (
        "granitemoehybrid",
        {"num_local_experts": 4},
        UnsupportedFeature,
        "num_local_experts 4: routed experts",
    ),
    "positions": ("granitemoehybrid", {"position_embedding_type": "alibi"}, UnsupportedFeature, "'alibi'"),
    "granite kinds": ("granitemoehybrid", {"layer_types": ["conv"] * 3}, UnsupportedFeature, "layer_types has 'conv'"),
    "too few kinds": (
        "granitemoehybrid",
        {"layer_types": ["mamba"]},
        InvalidModel,
        "layer_types.*num_hidden_layers = 3",
    ),
    "expert layers": (
        "nemotron_h",
        {"layers_block_type": ["linear_attention", "moe"]},
        UnsupportedFeature,
        "layers_block_type has 'moe', layers of routed experts",
    ),
    "a pattern": (
        "nemotron_h",
        {"layers_block_type": None, "hybrid_override_pattern": "M-X"},
        UnsupportedFeature,
        "hybrid_override_pattern has 'X'",
    ),
}


def _config(arch: str) -> dict[str, object]:
    made = CONFIGS[arch](**{**DIMENSIONS, **STATE_DIMENSIONS[arch]})
    config: dict[str, object] = json.loads(made.to_json_string())
    return config


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_key_and_value(case: str) -> None:
    arch, change, error, message = REFUSALS[case]
    assert read_spec(_config(arch)).state_shape() is not None
    with pytest.raises(error, match=message):
        read_spec({**_config(arch), **change})


def test_groups_of_ranks_that_do_not_fit_are_named() -> None:
    spec = read_spec(_config("mamba2"))
    in_proj = next(site for site in spec.sites() if site.module == "in_proj")
    with pytest.raises(
        UnsupportedFeature, match=r"tensor_parallel_size 3 does not divide num_heads = 8; .* 1, 2, 4, 8"
    ):
        in_proj.part(0, 3)


def test_no_limit_is_spelt_in_three_ways(tmp_path: Path) -> None:
    config = _config("mamba2")
    for spelt in ('{"__float__": "Infinity"}', "Infinity", "null"):
        text = json.dumps({**config, "time_step_limit": "LIMIT"})
        value = "null" if spelt == "null" else f"[0.0, {spelt}]"
        (tmp_path / "config.json").write_text(text.replace('"LIMIT"', value))
        assert read_spec(read_config(tmp_path)) == read_spec(config)


def test_old_spellings_of_nemotron_agree() -> None:
    new = _config("nemotron_h")
    old = {key: value for key, value in new.items() if key not in ("n_groups", "time_step_min", "layers_block_type")}
    old |= {"mamba_n_groups": 2, "mamba_dt_min": 0.2, "hybrid_override_pattern": "M-*M"}
    assert read_spec(old) == read_spec(new)


@torch.inference_mode()
def test_state_spaces_own_checkpoints(tmp_path: Path) -> None:
    """Their config, and their name for the embedding."""
    theirs = tiny_checkpoint(tmp_path, "mamba2", tie_word_embeddings=True)
    tensors = load_file(theirs / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    own = tmp_path / "own"
    own.mkdir()
    save_file(tensors, own / "model.safetensors")
    (own / "config.json").write_text(json.dumps(STATE_SPACES))
    ids = prompt(13)
    expected = oracle(theirs)(torch.tensor([ids])).logits[0]
    found = PackedRunner(load_tiny(own)).step([Chunk("s", ids)])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba1"}}, "ssm_cfg.layer 'Mamba1'"),
        ({"ssm_cfg": {}}, "ssm_cfg.layer"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx \[1\]"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "ssm_cfg has D_has_hdim"),
        ({"rms_norm": False}, "rms_norm False"),
    ],
)
def test_state_spaces_configs_that_are_not_served(change: dict[str, object], message: str) -> None:
    assert read_spec(STATE_SPACES).vocab_size == 96
    with pytest.raises(UnsupportedFeature, match=message):
        read_spec({**STATE_SPACES, **change})


@torch.inference_mode()
def test_names_as_other_model_code_spells_them(tmp_path: Path) -> None:
    """transformers writes nemotron_h's tensors under ``backbone.`` and has them in memory under ``model.``."""
    written = tiny_checkpoint(tmp_path, "nemotron_h")
    tensors = load_file(written / "model.safetensors")
    assert any(key.startswith("backbone.") for key in tensors)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(written / "config.json", other)
    save_file(
        {key.replace("backbone.", "model."): value for key, value in tensors.items()}, other / "model.safetensors"
    )
    ids = prompt(9)
    rows = [PackedRunner(load_tiny(path)).step([Chunk("s", ids)])[0] for path in (written, other)]
    assert torch.equal(rows[0], rows[1])


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    written = tiny_checkpoint(tmp_path, "mamba2")
    tensors = load_file(written / "model.safetensors")
    del tensors["backbone.layers.1.mixer.A_log"]
    tensors["backbone.layers.0.mixer.conv1d.weight"] = torch.zeros(3, 1, 4)
    save_file(tensors, written / "model.safetensors")
    with pytest.raises(InvalidModel, match=r"lacks backbone.layers.1.mixer.A_log, which Mamba2ForCausalLM needs"):
        load_tiny(written)
    tensors["backbone.layers.1.mixer.A_log"] = torch.zeros(8)
    save_file(tensors, written / "model.safetensors")
    with pytest.raises(
        InvalidModel, match=r"conv1d.weight' has shape \[3, 1, 4\], config.json calls for \[128, 1, 4\]"
    ):
        load_tiny(written)


@pytest.mark.parametrize("arch", STATE_DIMENSIONS)
def test_dummy_weights_give_finite_logits(arch: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_config(arch)))
    model = load_tiny(tmp_path, load_format="dummy")
    assert bool(PackedRunner(model).step([Chunk("s", prompt(9))])[0].isfinite().all())
