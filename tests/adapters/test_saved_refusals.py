"""Saved modules, trained tokens and vocabularies that do not fit, or that PEFT cannot run, are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.errors import InvalidAdapter, LoraplexError, Mismatch, UnsupportedFeature
from tests.adapters.peft_saved import SavedCase, load, lora, make
from tests.adapters.test_saved import tokens
from tests.tiny import VOCAB_SIZE as V
from tests.tiny import tiny_checkpoint

PREFIX = "base_model.model."
E = "model.embed_tokens"
Tensors = dict[str, torch.Tensor]

MADE: Final[dict[str, SavedCase]] = {
    "ends": SavedCase(lora(modules_to_save=["embed_tokens", "lm_head"])),
    "wide ends": SavedCase(lora(modules_to_save=["embed_tokens", "lm_head"]), vocab_size=V + 3),
    "norm": SavedCase(lora(modules_to_save=["model.norm"])),
    "mlp": SavedCase(lora(modules_to_save=["mlp"])),
    "tokens": SavedCase(lora(trainable_token_indices=[3, 9])),
    "tokens of both": SavedCase(lora(trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [4]})),
    "tokens alone": SavedCase(lambda: tokens(token_indices=[3, 9])),
    "wide, untrained": SavedCase(lora(), vocab_size=V + 3),
    "wide adapted embedding": SavedCase(lora(target_modules=["embed_tokens"]), vocab_size=V + 3),
    "asked for": SavedCase(lora(), save={"save_embedding_layers": True}),
    "lora": SavedCase(lora()),
    "wide, activated": SavedCase(lora(alora_invocation_tokens=[3, 4]), vocab_size=V + 3),
    "wide, tied again": SavedCase(lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), vocab_size=V + 3),
}


@dataclass(frozen=True)
class Refusal:
    """An adapter that PEFT made, spoiled, and what is said of it."""

    made: str
    error: type[LoraplexError]
    parts: list[str]
    change: Callable[[Tensors], Tensors] = lambda t: t
    keys: dict[str, Any] = field(default_factory=dict)
    tied: bool = False


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda t: t | {PREFIX + name: value}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {key: value for key, value in t.items() if key != PREFIX + name}


def shifted(name: str) -> Callable[[Tensors], Tensors]:
    return lambda t: t | {PREFIX + name: t[PREFIX + name] + 1}


def whole_attention() -> Tensors:
    """What saving every self_attn would write."""
    rows = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
    names = {(layer, module): size for layer in (0, 1) for module, size in rows.items()}
    return {
        f"{PREFIX}model.layers.{i}.self_attn.{name}.weight": torch.ones(size, 32) for (i, name), size in names.items()
    }


DELTA = f"{E}.token_adapter.trainable_tokens_delta"
REFUSALS: Final[dict[str, Refusal]] = {
    "added tokens of an adapter that is not on yet": Refusal(
        "wide, activated",
        UnsupportedFeature,
        [f"embeddings of {V + 3} tokens, more than the model's {V}", "together with invocation tokens"],
    ),
    # modules_to_save
    "a saved module without its weight": Refusal(
        "mlp",
        InvalidAdapter,
        ["modules_to_save names 'model.layers.0.mlp'", "'model.layers.0.mlp.up_proj.weight' is missing"],
        without("model.layers.0.mlp.up_proj.weight"),
    ),
    "a norm of another size": Refusal(
        "norm",
        Mismatch,
        ["the saved weight of 'model.norm' has shape [31], expected [32]"],
        put("model.norm.weight", torch.ones(31)),
    ),
    "a head of another hidden size": Refusal(
        "ends", Mismatch, ["'lm_head' has shape [96, 31], expected [96, 32]"], put("lm_head.weight", torch.ones(V, 31))
    ),
    "a list of layers": Refusal(
        "lora", UnsupportedFeature, ["'model.layers' is a list of modules"], keys={"modules_to_save": ["layers"]}
    ),
    "a module in another": Refusal(
        "mlp",
        UnsupportedFeature,
        ["'model.layers.0.mlp.up_proj' lies in 'model.layers.0.mlp'"],
        keys={"modules_to_save": ["mlp", "up_proj"]},
    ),
    "a module that is adapted": Refusal(
        "lora",
        UnsupportedFeature,
        ["modules_to_save saves 'model.layers.0.self_attn.q_proj', which is adapted as well"],
        lambda t: t | whole_attention(),
        {"modules_to_save": ["attn"]},
    ),
    "no list": Refusal("lora", InvalidAdapter, ["modules_to_save is 'norm'"], keys={"modules_to_save": "norm"}),
    "no names": Refusal("lora", InvalidAdapter, ["modules_to_save is [3]"], keys={"modules_to_save": [3]}),
    "a saved module that nothing names": Refusal(
        "norm", Mismatch, ["model.norm.weight", "land nowhere"], keys={"modules_to_save": None}
    ),
    "an alias that differs": Refusal(
        "wide ends",
        InvalidAdapter,
        ["'lm_head.modules_to_save.weight' and 'lm_head.weight' differ"],
        shifted("lm_head.modules_to_save.weight"),
    ),
    "tied ends that differ": Refusal(
        "wide, tied again",
        InvalidAdapter,
        ["ensure_weight_tying", "embedding and head differ"],
        lambda t: {k: v + ("lm_head" in k and "original" not in k) for k, v in t.items()},
        tied=True,
    ),
    # trained tokens
    "a token twice": Refusal(
        "tokens",
        InvalidAdapter,
        ["trainable_token_indices", "[3, 3]", "twice"],
        keys={"trainable_token_indices": [3, 3]},
    ),
    "a negative token": Refusal("tokens", InvalidAdapter, ["[3, -1]"], keys={"trainable_token_indices": [3, -1]}),
    "a token that is no id": Refusal(
        "tokens", InvalidAdapter, ["[3, True]"], keys={"trainable_token_indices": [3, True]}
    ),
    "no tokens": Refusal(
        "tokens", InvalidAdapter, ["trainable_token_indices", "[]"], keys={"trainable_token_indices": []}
    ),
    "tokens of no module": Refusal(
        "tokens", Mismatch, ["names 'wte'", "the model has"], keys={"trainable_token_indices": {"wte": [3, 9]}}
    ),
    "tokens of a norm": Refusal(
        "tokens",
        UnsupportedFeature,
        ["'model.norm'", "only rows of"],
        keys={"trainable_token_indices": {"model.norm": [3]}},
    ),
    "more tokens than rows": Refusal(
        "tokens",
        Mismatch,
        [f"'{DELTA}' has shape [2, 32], expected [3, 32]"],
        keys={"trainable_token_indices": [3, 9, 4]},
    ),
    "tokens without rows": Refusal("tokens", InvalidAdapter, [f"'{DELTA}' is missing"], without(DELTA)),
    "a row that the model has not": Refusal(
        "tokens",
        InvalidAdapter,
        ["'model.layers.0.self_attn.v_proj' has no row 77"],
        lambda t: (
            {k: v for k, v in t.items() if "token_adapter" not in k}
            | {
                f"{PREFIX}model.layers.{i}.self_attn.v_proj.token_adapter.trainable_tokens_delta": torch.ones(1, 32)
                for i in (0, 1)
            }
        ),
        {"trainable_token_indices": {"v_proj": [77]}},
    ),
    "tied ends with other tokens": Refusal(
        "tokens of both", InvalidAdapter, ["ensure_weight_tying"], keys={"ensure_weight_tying": True}, tied=True
    ),
    "tied tokens that differ": Refusal(
        "tokens alone",
        InvalidAdapter,
        ["trained tokens of the tied"],
        shifted("lm_head.trainable_tokens_delta"),
        tied=True,
    ),
    "both tied ends": Refusal(
        "tokens alone",
        UnsupportedFeature,
        ["names both"],
        keys={"target_modules": ["embed_tokens", "lm_head"]},
        tied=True,
    ),
    "tokens of an adapted embedding": Refusal(
        "tokens",
        UnsupportedFeature,
        ["trainable_token_indices names 'model.embed_tokens', which is adapted as well"],
        lambda t: (
            t | {f"{PREFIX}{E}.lora_embedding_A": torch.ones(2, V), f"{PREFIX}{E}.lora_embedding_B": torch.ones(32, 2)}
        ),
        {"target_modules": ["q_proj", "embed_tokens"]},
    ),
    "tokens of a saved embedding": Refusal(
        "tokens",
        UnsupportedFeature,
        ["modules_to_save saves 'model.embed_tokens', which is named by trainable_token_indices"],
        put(f"{E}.weight", torch.ones(V, 32)),
        {"modules_to_save": ["embed_tokens"]},
    ),
    "no token_indices": Refusal("tokens alone", InvalidAdapter, ["token_indices"], keys={"token_indices": []}),
    "tokens alone of no module": Refusal("tokens alone", Mismatch, ["matches none"], keys={"target_modules": ["wte"]}),
    # vocabulary
    "a token past a saved vocabulary": Refusal(
        "wide, untrained",
        InvalidAdapter,
        [f"token {V + 3} lies past the vocabulary of {V + 3} tokens"],
        put(DELTA, torch.ones(1, 32)),
        {"trainable_token_indices": [V + 3]},
    ),
    "a hole": Refusal(
        "tokens",
        InvalidAdapter,
        [f"token {V} has no row at '{E}'"],
        keys={"trainable_token_indices": [3, V + 1]},
        tied=True,
    ),
    "new tokens without a head": Refusal(
        "tokens",
        InvalidAdapter,
        [f"token {V} has no row at 'lm_head'", "save_embedding_layers=True"],
        keys={"trainable_token_indices": [3, V]},
    ),
    "an adapted embedding without its head": Refusal(
        "wide adapted embedding", InvalidAdapter, [f"token {V} has no row at 'lm_head'"]
    ),
    "far too many tokens": Refusal(
        "tokens",
        InvalidAdapter,
        ["trainable_token_indices: token ", "at most 65536 may be added"],
        keys={"trainable_token_indices": [3, 10**9]},
        tied=True,
    ),
    "a smaller vocabulary": Refusal(
        "asked for",
        Mismatch,
        ["a vocabulary of 90 tokens, the base model has 96"],
        lambda t: {k: v[:90] if v.shape[0] == V else v for k, v in t.items()},
    ),
    "ends that disagree": Refusal(
        "wide, untrained",
        Mismatch,
        ["disagree on the vocabulary's size", "'lm_head' 98"],
        lambda t: {k: v[:98] if "lm_head" in k else v for k, v in t.items()},
    ),
    "tied copies that differ": Refusal(
        "wide, untrained", InvalidAdapter, ["though the base ties them"], shifted("lm_head.weight"), tied=True
    ),
    "a copy of an end that is not adapted": Refusal(
        "lora",
        Mismatch,
        ["'lm_head.base_layer.weight' lands nowhere"],
        put("lm_head.base_layer.weight", torch.ones(V, 32)),
    ),
    "a copy of one that is": Refusal(
        "wide adapted embedding",
        Mismatch,
        ["'model.embed_tokens.weight' lands nowhere"],
        lambda t: {k.replace("base_layer.", ""): v for k, v in t.items()},
        tied=True,
    ),
    "two copies": Refusal(
        "wide, untrained",
        InvalidAdapter,
        ["two copies of the base's 'lm_head'"],
        put("lm_head.base_layer.weight", torch.ones(V + 3, 32)),
    ),
    "a copy that is no matrix": Refusal("asked for", Mismatch, ["shape [96]"], put("lm_head.weight", torch.ones(V))),
    "original without its module": Refusal(
        "lora", Mismatch, ["land nowhere"], put("lm_head.original_module.weight", torch.ones(V, 32))
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("refused")
    return {tied: tiny_checkpoint(root, "llama", tie_word_embeddings=tied) for tied in (False, True)}


def spoil(path: Path, change: Callable[[Tensors], Tensors], keys: dict[str, Any], **metadata: str) -> None:
    config = json.loads((path / "adapter_config.json").read_text()) | keys
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = change(load_file(path / "adapter_model.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "adapter_model.safetensors", metadata)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(tmp_path: Path, checkpoints: dict[bool, Path], name: str) -> None:
    case = REFUSALS[name]
    make(MADE[case.made], checkpoints[case.tied], tmp_path)
    spoil(tmp_path, case.change, case.keys)
    with pytest.raises(case.error) as caught:
        load(tmp_path, checkpoints[case.tied])
    for part in (str(tmp_path), *case.parts):
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1000
    if isinstance(caught.value, UnsupportedFeature):
        assert caught.value.field in (
            "modules_to_save",
            "trainable_token_indices",
            "target_modules",
            "alora_invocation_tokens",
        )
