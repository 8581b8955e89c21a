"""What disagrees in an adapter of the LoRA family is refused by name, and nothing of it is served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig

from loraplex.adapters.load import load_adapter
from loraplex.adapters.reading.source import any_directory
from loraplex.adapters.reading.tensors import PREFIX
from loraplex.errors import InvalidAdapter, LoraplexError, Mismatch, OverCapacity, UnsupportedFeature
from tests.adapters.peft_sites import files_of, load, lora_config, save_adapter
from tests.fakes_adapters import view_of, write_adapter
from tests.tiny import tiny_model

Q0 = "model.layers.0.self_attn.q_proj"
DORA = {"use_dora": True, "target_modules": ["q_proj"]}
BIASED = {"lora_bias": True, "target_modules": ["q_proj"]}
BLOCKED = {"use_bdlora": BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2), "target_modules": ["q_proj"]}
ALORA = {"alora_invocation_tokens": [3, 4], "target_modules": ["q_proj"]}
Change = tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor | None], type[LoraplexError], str]
REFUSALS: dict[str, Change] = {
    "no magnitude": (
        DORA,
        {},
        {"lora_magnitude_vector": None},
        InvalidAdapter,
        rf"'{Q0}' has no lora_magnitude_vector",
    ),
    "magnitude shape": (
        DORA,
        {},
        {"lora_magnitude_vector": torch.ones(1, 32)},
        Mismatch,
        r"has shape \[1, 32\], expected \[32\]",
    ),
    "two magnitudes": (
        DORA,
        {},
        {"lora_magnitude_vector.weight": torch.ones(32)},
        InvalidAdapter,
        rf"lora_magnitude_vector and lora_magnitude_vector.weight of '{Q0}' differ",
    ),
    "magnitude NaN": (
        DORA,
        {},
        {"lora_magnitude_vector": torch.full((32,), float("nan"))},
        InvalidAdapter,
        "NaN or Inf",
    ),
    "magnitudes not asked for": (
        DORA,
        {"use_dora": False},
        {},
        Mismatch,
        "lora_magnitude_vector.*land nowhere|land nowhere.*lora_magnitude_vector",
    ),
    "no bias of B": (
        BIASED,
        {},
        {"lora_B.bias": None},
        InvalidAdapter,
        rf"lora_bias is set, but '{Q0}' has no lora_B.bias",
    ),
    "bias of B, shape": (
        BIASED,
        {},
        {"lora_B.bias": torch.ones(33)},
        Mismatch,
        r"lora_B.bias of .* has shape \[33\], expected \[32\]",
    ),
    "bias of B not asked for": (BIASED, {"lora_bias": False}, {}, Mismatch, "land nowhere.*lora_B.bias"),
    "lora_bias and dora": (
        BIASED,
        {"use_dora": True},
        {},
        UnsupportedFeature,
        "use_dora and lora_bias are not served together",
    ),
    "lora_bias and an init": (
        BIASED,
        {"init_lora_weights": "eva"},
        {},
        UnsupportedFeature,
        "init_lora_weights and lora_bias",
    ),
    "lora_bias and mica": (
        BIASED,
        {"init_lora_weights": "mica"},
        {},
        UnsupportedFeature,
        "init_lora_weights and lora_bias",
    ),
    "blocks as dense": (
        BLOCKED,
        {"use_bdlora": None},
        {},
        InvalidAdapter,
        r"lora_B of .*\[32, 2\], expected \[32, 4\]: rank 2, where .* 4",
    ),
    "dense as blocks": (
        BLOCKED,
        {},
        {"lora_B.weight": torch.ones(32, 4)},
        InvalidAdapter,
        r"\[32, 4\], expected \[32, 2\]: rank 8, where .* 4",
    ),
    "blocks of another base": (
        BLOCKED,
        {},
        {"lora_B.weight": torch.ones(31, 2)},
        Mismatch,
        r"\[31, 2\], expected \[32, 2\]",
    ),
    "other nblocks": (
        BLOCKED,
        {"use_bdlora": {"nblocks": 4, "target_modules_bd_b": ["q_proj"]}},
        {},
        InvalidAdapter,
        r"expected \[32, 1\]: rank 8",
    ),
    "nblocks that do not divide": (
        BLOCKED,
        {"use_bdlora": {"nblocks": 3, "target_modules_bd_b": ["q_proj"]}},
        {},
        InvalidAdapter,
        r"lora_B of .* is \[32, 4\], which 3 blocks do not divide",
    ),
    "nblocks 0": (
        BLOCKED,
        {"use_bdlora": {"nblocks": 0}},
        {},
        InvalidAdapter,
        "use_bdlora: nblocks is 0; expected an integer of at least 1",
    ),
    "neither list": (
        BLOCKED,
        {"use_bdlora": {"target_modules_bd_a": ["o_proj"]}},
        {},
        InvalidAdapter,
        rf"match_strict is set, but neither list matches '{Q0}'",
    ),
    "empty bdlora": (BLOCKED, {"use_bdlora": {}}, {}, InvalidAdapter, "match_strict is set, but neither"),
    "both lists match": (
        BLOCKED,
        {"use_bdlora": {"target_modules_bd_a": ["layers.0"], "target_modules_bd_b": ["q_proj"]}},
        {},
        InvalidAdapter,
        rf"both lists of modules match '{Q0}'",
    ),
    "both lists hold": (
        BLOCKED,
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["q_proj"]}},
        {},
        InvalidAdapter,
        "'q_proj' is in target_modules_bd_a and in",
    ),
    "a key of no bdlora": (
        BLOCKED,
        {"use_bdlora": {"blocks": 2}},
        {},
        InvalidAdapter,
        "use_bdlora: unknown key 'blocks'",
    ),
    "a name for a list": (
        BLOCKED,
        {"use_bdlora": {"target_modules_bd_a": "q_proj"}},
        {},
        InvalidAdapter,
        "use_bdlora: target_modules_bd_a is 'q_proj'",
    ),
    "tokens past the vocabulary": (
        ALORA,
        {"alora_invocation_tokens": [3, 96]},
        {},
        InvalidAdapter,
        "alora_invocation_tokens has 96; the model's vocabulary is 0 to 95",
    ),
    "tokens that are none": (
        ALORA,
        {"alora_invocation_tokens": [3, True]},
        {},
        InvalidAdapter,
        r"alora_invocation_tokens is \[3, True\]",
    ),
    "negative tokens": (
        ALORA,
        {"alora_invocation_tokens": [-1]},
        {},
        InvalidAdapter,
        r"alora_invocation_tokens is \[-1\]",
    ),
    "alora and dora": (
        ALORA,
        {"use_dora": True},
        {},
        UnsupportedFeature,
        "use_dora and alora_invocation_tokens are not served together",
    ),
    "alora and bdlora": (ALORA, {"use_bdlora": {}}, {}, UnsupportedFeature, "use_bdlora and alora_invocation_tokens"),
    "alora and mica": (
        ALORA,
        {"init_lora_weights": "mica"},
        {},
        UnsupportedFeature,
        "alora_invocation_tokens and init_lora_weights",
    ),
    "dora and bdlora": (DORA, {"use_bdlora": {"nblocks": 2}}, {}, UnsupportedFeature, "use_dora and use_bdlora"),
    "dora and mica": (DORA, {"init_lora_weights": "mica"}, {}, UnsupportedFeature, "use_dora and init_lora_weights"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_of_the_family(tmp_path: Path, name: str) -> None:
    made, keys, tensors, error, message = REFUSALS[name]
    model = tiny_model("llama")
    save_adapter(model, tmp_path, lora_config(**{"r": 4, **made}))
    config, saved = files_of(tmp_path)
    changed = {**saved, **{f"{PREFIX}{Q0}.{end}": tensor for end, tensor in tensors.items()}}
    path = write_adapter(tmp_path / "bad", config | keys, {k: v for k, v in changed.items() if v is not None})
    with pytest.raises(error, match=message) as caught:
        load(path, view_of(model))
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_blocks_that_stand_for_more_than_an_adapter_may_take(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_adapter(model, tmp_path, lora_config(**{"r": 4, **BLOCKED}))
    source = any_directory(str(tmp_path))
    needed = load(tmp_path, view_of(model)).nbytes
    room = max(needed, (tmp_path / "adapter_model.safetensors").stat().st_size)
    assert load_adapter(source, view_of(model), max_bytes=room).nbytes == needed
    # more bytes an element, and the file is the same
    with pytest.raises(OverCapacity, match=rf"low-rank form takes {2 * needed} bytes .*; at most {room} are allowed"):
        load_adapter(source, replace(view_of(model), dtype=torch.float64), max_bytes=room)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "modules_to_save"])
def test_a_hostile_pattern_of_a_tied_model(tmp_path: Path, key: str) -> None:
    """Wherever a pattern is asked, it gives up with the config's name."""
    tied = tiny_model("qwen2", tie_word_embeddings=True)
    save_adapter(tied, tmp_path, lora_config(target_modules=["q_proj"]))
    config, tensors = files_of(tmp_path)
    hostile = "((.*){1000}){1000}x"
    keys: dict[str, Any] = {"target_modules": ".*q_proj", "ensure_weight_tying": True, "bias": "all"}
    keys[key] = [hostile] if key == "modules_to_save" else hostile
    path = write_adapter(tmp_path / "bad", config | keys, tensors)
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json: the patterns take too long"):
        load(path, view_of(tied))


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"alora_invocation_tokens": [1]}, UnsupportedFeature, r"'model\.embed_tokens' is an embedding"),
        ({"lora_bias": True}, UnsupportedFeature, r"lora_bias is not served for 'model\.embed_tokens'"),
        (
            {"use_bdlora": {"match_strict": False}},
            UnsupportedFeature,
            r"use_bdlora is not served for 'model\.embed_tokens'",
        ),
    ],
)
def test_embeddings_that_peft_refuses(
    tmp_path: Path, keys: dict[str, Any], error: type[LoraplexError], message: str
) -> None:
    model = tiny_model("llama")
    save_adapter(model, tmp_path, lora_config(target_modules=["embed_tokens"]))
    config, tensors = files_of(tmp_path)
    with pytest.raises(error, match=message) as caught:
        load(write_adapter(tmp_path / "bad", config | keys, tensors), view_of(model))
    assert caught.value.field in (*keys, "target_modules")


@pytest.mark.parametrize(
    "keys", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": [1]}], ids=str
)
def test_alora_beside_what_changes_every_token(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = tiny_model("llama")
    save_adapter(model, tmp_path, lora_config(**ALORA, **keys))
    with pytest.raises(UnsupportedFeature, match="together with alora_invocation_tokens is not served") as caught:
        load(tmp_path, view_of(model))
    assert caught.value.field in keys


def test_a_dora_that_peft_cannot_run(tmp_path: Path) -> None:
    tied = tiny_model("llama", tie_word_embeddings=True)
    config = lora_config(use_dora=True, target_modules=["lm_head"], trainable_token_indices=[1, 2])
    adapted = save_adapter(tied, tmp_path, config)
    with pytest.raises(AttributeError, match="bias"):
        adapted(torch.tensor([[5]]))
    with pytest.raises(UnsupportedFeature, match="use_dora at a head tied to the embedding") as caught:
        load(tmp_path, view_of(tied))
    assert caught.value.field == "trainable_token_indices"


def test_alora_with_trained_biases(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    save_adapter(model, tmp_path, lora_config(target_modules=["q_proj"], alora_invocation_tokens=[1], bias="all"))
    with pytest.raises(UnsupportedFeature, match="bias together with alora_invocation_tokens") as caught:
        load(tmp_path, view_of(model))
    assert caught.value.field == "bias"


def test_a_direction_that_is_zero(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_adapter(model, tmp_path, lora_config(**DORA))
    with torch.no_grad():
        model.get_submodule(Q0).weight[3] = 0
    config, tensors = files_of(tmp_path)
    tensors[f"{PREFIX}{Q0}.lora_B.weight"][3] = 0
    with pytest.raises(InvalidAdapter, match=f"row of '{Q0}' .* has no direction"):
        load(write_adapter(tmp_path / "bad", config, tensors), view_of(model))


def test_a_magnitude_that_leaves_the_range(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_adapter(model, tmp_path, lora_config(**DORA))
    config, tensors = files_of(tmp_path)
    key = f"{PREFIX}{Q0}.lora_magnitude_vector"
    huge = write_adapter(tmp_path / "huge", config, tensors | {key: tensors[key] * 1e7})
    assert load(huge, view_of(model)).kind == "dora"
    with pytest.raises(InvalidAdapter, match=r"leave the range of the base's torch\.float16"):
        load(huge, view_of(model, torch.float16))


BIAS_REFUSALS: dict[str, tuple[Any, dict[str, Any], type[LoraplexError], str]] = {
    "missing": (lambda key: ".k_proj." in key, {}, Mismatch, r"bias='all' in .*no bias is there of .*0.*k_proj, .*1"),
    "targeted missing": (lambda key: "q_proj.base_layer" in key, {}, Mismatch, r"no bias is there of .*q_proj"),
    "not asked for": (
        lambda key: False,
        {"bias": "none"},
        Mismatch,
        r"base_layer\.bias.*land nowhere|land nowhere.*bias",
    ),
    "too many": (lambda key: False, {"bias": "lora_only"}, Mismatch, r"land nowhere: .*k_proj\.bias"),
    "no word": (
        lambda key: False,
        {"bias": "vera_only"},
        InvalidAdapter,
        r"bias is 'vera_only'; expected one of none, all, lora_only",
    ),
    "no text": (lambda key: False, {"bias": None}, InvalidAdapter, "bias is None"),
}


@pytest.mark.parametrize("name", BIAS_REFUSALS)
def test_biases_that_disagree(tmp_path: Path, name: str) -> None:
    is_dropped, keys, error, message = BIAS_REFUSALS[name]
    model = tiny_model("qwen2")
    save_adapter(model, tmp_path, lora_config(target_modules=["q_proj"], bias="all"))
    config, tensors = files_of(tmp_path)
    left = {key: tensor for key, tensor in tensors.items() if not is_dropped(key)}
    with pytest.raises(error, match=message):
        load(write_adapter(tmp_path / "bad", config | keys, left), view_of(model))


def test_a_bias_of_another_shape(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    save_adapter(model, tmp_path, lora_config(target_modules=["q_proj"], bias="lora_only"))
    config, tensors = files_of(tmp_path)
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias"
    for odd in (torch.ones(31), torch.ones(1), torch.ones(32, 1)):
        with pytest.raises(Mismatch, match=r"bias of 'model\.layers\.0\.self_attn\.q_proj' has shape"):
            load(write_adapter(tmp_path / "bad", config, tensors | {key: odd}), view_of(model))


def test_factors_that_should_be_tied(tmp_path: Path) -> None:
    tied = tiny_model("qwen2", tie_word_embeddings=True)
    config = lora_config(target_modules=["embed_tokens"], ensure_weight_tying=True)
    save_adapter(tied, tmp_path / "good", config)
    saved, tensors = files_of(tmp_path / "good")
    key = "base_model.model.lm_head.lora_B.weight"
    other = write_adapter(tmp_path / "other", saved, tensors | {key: tensors[key] + 1})
    with pytest.raises(InvalidAdapter, match=r"factors of 'lm_head' are not those of 'model\.embed_tokens'"):
        load(other, view_of(tied))
    with pytest.raises(Mismatch, match="1 sites have tensors but are not selected"):
        load(write_adapter(tmp_path / "untied", saved | {"ensure_weight_tying": False}, tensors), view_of(tied))
