"""LoRA and rsLoRA lowering equals PEFT on a tiny Llama; what does not fit is refused by name."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.lint import lint
from loraplex.adapters.load import load_adapter
from loraplex.adapters.packed import facts_of
from loraplex.adapters.reading.config_file import parse_config
from loraplex.adapters.reading.keys import ConfigReader
from loraplex.adapters.reading.source import AdapterDir, any_directory
from loraplex.adapters.reading.targets import Targets
from loraplex.errors import InvalidAdapter, LoraplexError, Mismatch, OverCapacity, UnsupportedFeature
from tests.fakes_adapters import load_peft, save_peft, sites_of, tiny_llama, view_of, write_adapter

LIMIT = 1 << 24
Tensors = dict[str, torch.Tensor]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return tiny_llama()


def load(path: Path, base: BaseView) -> AdapterDelta:
    return load_adapter(any_directory(str(path)), base, max_bytes=LIMIT)


CONFIGS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 24},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "r": 8, "lora_alpha": 3, "use_rslora": True},
    "float alpha": {"target_modules": ["o_proj"], "lora_alpha": 2.5},
    "regex": {"target_modules": r"model\.layers\.1\..*(q|up)_proj"},
    "all-linear": {"target_modules": "ALL-linear", "exclude_modules": ["k_proj", "model.layers.1.mlp.up_proj"]},
    "exclude regex": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
    "full names": {"target_modules": ["model.layers.1.mlp.up_proj", "layers.0.self_attn.k_proj"]},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "rank_pattern": {
        "target_modules": "all-linear",
        "r": 4,
        # in sorted order, which is how PEFT saves them: where several match, the first counts
        "rank_pattern": {
            "^model.*down_proj": 5,
            r"layers\.1\..*_proj": 3,
            "model.layers.0.mlp.up_proj": 7,
            "q_proj": 2,
        },
        "alpha_pattern": {r".*(k|v)_proj": 31, "o.proj": 9.5, "proj": 1, "self_attn.q_proj": 5},
    },
    "rank_pattern rslora": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"q_proj|k_proj": 6, "proj": 9},
        "alpha_pattern": {"0.self_attn.q_proj": 17},
    },
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "rank_pattern": {"embed_tokens": 3}},
    "head alone": {"target_modules": ["lm_head"]},
    "no dropout in serving": {"target_modules": ["q_proj"], "lora_dropout": 0.5},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_lowering_equals_peft(tmp_path: Path, model: LlamaForCausalLM, name: str) -> None:
    save_peft(copy.deepcopy(model), tmp_path, **CONFIGS[name])
    # PEFT saves "all-linear" as the names it found; the word itself must mean the same
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    saved["target_modules"] = CONFIGS[name]["target_modules"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    adapted = load_peft(copy.deepcopy(model), tmp_path)
    found = load(tmp_path, view_of(model))
    targeted = set(adapted.base_model.targeted_module_names)
    assert set(found.sites) == targeted
    kinds = {site.name: site.kind for site in sites_of(model)}
    for site, delta in found.sites.items():
        expected = adapted.base_model.model.get_submodule(site).get_delta_weight("default").detach()
        assert delta.low_rank is not None
        got = delta.low_rank.dense() if kinds[site] == "linear" else delta.low_rank.dense().T
        assert expected.abs().amax() > 1e-3
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert found.kind == ("rslora" if CONFIGS[name].get("use_rslora") else "lora")
    assert sum(found.coverage.sites.values()) == len(targeted)
    assert max(found.coverage.ranks.values()) == found.max_rank


def test_tied_embeddings(tmp_path: Path) -> None:
    tied = tiny_llama(tied=True)
    save_peft(copy.deepcopy(tied), tmp_path, target_modules=["embed_tokens", "v_proj"])
    assert set(load(tmp_path, view_of(tied)).coverage.sites) == {"embed_tokens", "v_proj"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_are_rounded_once(tmp_path: Path, model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    adapted = save_peft(copy.deepcopy(model), tmp_path, target_modules=["q_proj"])
    delta = load(tmp_path, view_of(model, dtype)).sites["model.layers.0.self_attn.q_proj"].low_rank
    assert delta is not None
    layer = adapted.base_model.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert torch.equal(delta.a, layer.lora_A["default"].weight.detach().to(dtype))
    assert torch.equal(delta.b, layer.lora_B["default"].weight.detach().to(dtype))


# ---- refusals ----


def changed(tensors: Tensors, **by_suffix: torch.Tensor) -> Tensors:
    return tensors | {f"{Q0}.{key}.weight": value for key, value in by_suffix.items()}


def without(tensors: Tensors, *parts: str) -> Tensors:
    return {key: value for key, value in tensors.items() if not any(part in key for part in parts)}


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {key.replace(old, new): value for key, value in tensors.items()}


REFUSALS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], type[LoraplexError], list[str]]] = {
    "other names": (
        lambda t: renamed(t, "q_proj", "wq"),
        {"target_modules": ["wq"]},
        Mismatch,
        [
            "target 'wq' matches no site",
            f"{Q0.replace('q_proj', 'wq')}.lora_A.weight",
            "the model has",
            "q_proj, k_proj",
        ],
    ),
    "one stray": (
        lambda t: t | {"base_model.model.extra": torch.ones(1)},
        {},
        Mismatch,
        ["base_model.model.extra", "land nowhere"],
    ),
    "no prefix": (lambda t: renamed(t, "base_model.model.", ""), {}, Mismatch, ["land nowhere", "and 4 more"]),
    "dora magnitude": (
        lambda t: t | {f"{Q0}.lora_magnitude_vector": torch.ones(32)},
        {},
        Mismatch,
        ["lora_magnitude_vector", "land nowhere"],
    ),
    "embedding keys on a linear site": (
        lambda t: t | {f"{Q0}.lora_embedding_A": torch.ones(4, 32)},
        {},
        Mismatch,
        ["lora_embedding_A", "land nowhere"],
    ),
    "a base copy where none belongs": (
        lambda t: t | {f"{Q0}.base_layer.weight": torch.ones(32, 32)},
        {},
        Mismatch,
        ["base_layer.weight", "land nowhere"],
    ),
    "more layers in the model": (
        lambda t: without(t, "layers.1."),
        {},
        Mismatch,
        ["only part of the adapter lands", "of 4 sites", "2 have no tensors", "model.layers.1.self_attn.q_proj"],
    ),
    "tensors that the config does not target": (
        lambda t: t,
        {"target_modules": ["q_proj"]},
        Mismatch,
        ["2 sites have tensors but are not selected by target_modules", "model.layers.0.self_attn.v_proj"],
    ),
    "targets that match nothing": (
        lambda t: t,
        {"target_modules": ["nothing"]},
        Mismatch,
        ["adapter_config.json: target_modules 'nothing' matches none", "the model has", "q_proj, k_proj"],
    ),
    "A without B": (
        lambda t: without(t, "0.self_attn.q_proj.lora_B"),
        {},
        InvalidAdapter,
        ["without lora_B", "model.layers.0.self_attn.q_proj"],
    ),
    "B without A": (
        lambda t: without(t, "0.self_attn.q_proj.lora_A"),
        {},
        InvalidAdapter,
        ["without lora_A", "model.layers.0.self_attn.q_proj"],
    ),
    "wrong input size": (
        lambda t: changed(t, lora_A=torch.ones(4, 31)),
        {},
        Mismatch,
        ["lora_A of 'model.layers.0.self_attn.q_proj'", "[4, 31]", "expected [4, 32]", "another base model"],
    ),
    "wrong output size": (
        lambda t: changed(t, lora_B=torch.ones(33, 4)),
        {},
        Mismatch,
        ["lora_B of 'model.layers.0.self_attn.q_proj'", "[33, 4]", "expected [32, 4]"],
    ),
    "three dimensions": (lambda t: changed(t, lora_A=torch.ones(4, 32, 1)), {}, Mismatch, ["[4, 32, 1]"]),
    "empty": (lambda t: changed(t, lora_A=torch.ones(0, 32)), {}, InvalidAdapter, ["[0, 32]"]),
    "rank of another config": (
        lambda t: t,
        {"r": 8},
        InvalidAdapter,
        ["rank 4, where adapter_config.json says 8"],
    ),
    "rank_pattern of another config": (
        lambda t: t,
        {"rank_pattern": {"v_proj": 2}},
        InvalidAdapter,
        ["'model.layers.0.self_attn.v_proj'", "rank 4, where adapter_config.json says 2"],
    ),
    "every B zero": (
        lambda t: {key: value * ("lora_A" in key) for key, value in t.items()},
        {},
        InvalidAdapter,
        ["changes nothing: every lora_B is zero"],
    ),
    "every product zero": (
        lambda t: {key: value * (("lora_A" in key) is ("q_proj" in key)) for key, value in t.items()},
        {},
        InvalidAdapter,
        ["changes nothing: at every site lora_A or lora_B is zero"],
    ),
    "NaN": (
        lambda t: changed(t, lora_A=torch.full((4, 32), float("nan"))),
        {},
        InvalidAdapter,
        ["adapter_model.safetensors: tensor", "q_proj.lora_A.weight", "NaN or Inf"],
    ),
    "a bad pattern": (lambda t: t, {"target_modules": "(q_proj"}, InvalidAdapter, ["target_modules", "'(q_proj'"]),
    "a pattern that is not read": (
        lambda t: t,
        {"rank_pattern": {r"(q)\1_proj": 2}},
        InvalidAdapter,
        ["rank_pattern", r"uses \\1".replace("\\\\", "\\")],
    ),
    "a pattern that closes the brackets PEFT puts around it": (  # PEFT reads (.*\.)?(l)|(x)$, which scales every module
        lambda t: t,
        {"alpha_pattern": {"l)|(x": 2}},
        InvalidAdapter,
        ["alpha_pattern", "unbalanced ')'", "l)|(x"],
    ),
    "a lora as a dora": (
        lambda t: t,
        {"use_dora": True},
        InvalidAdapter,
        ["use_dora is set", "no lora_magnitude_vector"],
    ),
    "an odd method of LoRA": (
        lambda t: t,
        {"kasa_config": {"beta": 1e-4}},
        UnsupportedFeature,
        ["adapter_config.json: kasa_config={'beta'", "truncates the base model's weights"],
    ),
    "one dimension": (lambda t: changed(t, lora_A=torch.ones(32)), {}, Mismatch, ["[32]", "expected [4, 32]"]),
    "another prefix": (
        lambda t: t | {key.replace("base_model.model", "base_model"): t[key] for key in list(t)[:1]},
        {},
        Mismatch,
        ["1 tensors land nowhere: base_model.model."],
    ),
    "other names for some": (
        lambda t: renamed(t, "v_proj.lora_A", "v_proj.lora_a"),
        {},
        Mismatch,
        ["target 'v_proj' matches no site: 2 tensors land nowhere", "v_proj.lora_a.weight"],
    ),
    "another method": (lambda t: t, {"peft_type": "OFT"}, UnsupportedFeature, ["peft_type=OFT"]),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM) -> tuple[dict[str, Any], Tensors]:
    path = tmp_path_factory.mktemp("good")
    save_peft(copy.deepcopy(model), path, target_modules=["q_proj", "v_proj"])
    config = json.loads((path / "adapter_config.json").read_text())
    return config, load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(tmp_path: Path, model: LlamaForCausalLM, good: tuple[dict[str, Any], Tensors], name: str) -> None:
    change, keys, error, parts = REFUSALS[name]
    config, tensors = good
    path = write_adapter(tmp_path / "fr", config | keys, change(tensors))
    with pytest.raises(error) as caught:
        load(path, view_of(model))
    assert str(path) in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_unchanged_adapter_is_accepted(
    tmp_path: Path, model: LlamaForCausalLM, good: tuple[dict[str, Any], Tensors]
) -> None:
    found = load(write_adapter(tmp_path, *good), view_of(model))
    assert found.coverage.sites == {"q_proj": 2, "v_proj": 2}
    assert found.num_parameters == sum(tensor.numel() for tensor in good[1].values())
    assert found.nbytes == 4 * found.num_parameters


def test_a_target_without_tensors_changes_nothing(
    tmp_path: Path, model: LlamaForCausalLM, good: tuple[dict[str, Any], Tensors]
) -> None:
    config = good[0] | {"target_modules": ["q_proj", "v_proj", "query_key_value"]}
    assert len(load(write_adapter(tmp_path, config, good[1]), view_of(model)).sites) == 4


def test_values_that_leave_the_base_dtype(
    tmp_path: Path, model: LlamaForCausalLM, good: tuple[dict[str, Any], Tensors]
) -> None:
    huge = write_adapter(tmp_path / "huge", good[0], changed(good[1], lora_A=torch.full((4, 32), 1e6)))
    assert load(huge, view_of(model)).max_rank == 4
    with pytest.raises(InvalidAdapter, match=r"leave the range of the base's torch\.float16"):
        load(huge, view_of(model, torch.float16))
    scaled = write_adapter(tmp_path / "scaled", good[0] | {"lora_alpha": 10**9}, good[1])
    with pytest.raises(InvalidAdapter, match=r"scale 2\.5e\+08"):
        load(scaled, view_of(model, torch.float16))
    tiny = {key: value * 1e-12 for key, value in good[1].items()}
    with pytest.raises(InvalidAdapter, match="changes nothing"):
        load(write_adapter(tmp_path / "tiny", good[0], tiny), view_of(model, torch.float16))


def test_hostile_patterns_do_not_hang_the_load() -> None:
    patterns = {f"(.*(a|aa|{index}|.){{0,900}}){{0,900}}x": 2 for index in range(1000)}
    config = {"peft_type": "LORA", "target_modules": "all-linear", "rank_pattern": patterns}
    targets = Targets(ConfigReader(parse_config(json.dumps(config).encode(), "fr/adapter_config.json")).target_rule())
    started = time.perf_counter()
    ranks = targets.per_module("rank_pattern", patterns, 8)
    with pytest.raises(InvalidAdapter, match=r"fr/adapter_config\.json: the patterns take too long"):
        [ranks.of(f"model.layers.{layer}.self_attn.q_proj") for layer in range(1000)]
    assert time.perf_counter() - started < 20


def test_the_copy_of_an_embedding(tmp_path: Path, model: LlamaForCausalLM) -> None:
    """PEFT saves the base weight of a targeted embedding, and loads it: one that differs is the adapter's own."""
    save_peft(copy.deepcopy(model), tmp_path / "e", target_modules=["embed_tokens"])
    config = json.loads((tmp_path / "e/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "e/adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in tensors
    half = write_adapter(tmp_path / "half", config, tensors | {key: tensors[key].bfloat16()})
    assert load(half, view_of(model)).coverage.changes == {"embed_tokens": "low rank"}
    row = tensors[key].clone()
    row[5] += 0.01
    other = load(write_adapter(tmp_path / "other", config, tensors | {key: row}), view_of(model))
    assert other.coverage.changes == {"embed_tokens": "low rank, own rows"}
    narrow = write_adapter(tmp_path / "narrow", config, tensors | {key: torch.ones(48, 31)})
    with pytest.raises(Mismatch, match=r"copy of 'model\.embed_tokens' has shape \[48, 31\]"):
        load(narrow, view_of(model))


def test_too_large(tmp_path: Path, model: LlamaForCausalLM, good: tuple[dict[str, Any], Tensors]) -> None:
    path = write_adapter(tmp_path, *good)
    with pytest.raises(OverCapacity, match="at most 100 are allowed"):
        load_adapter(any_directory(str(path)), view_of(model), max_bytes=100)


def test_lint_says_what_a_load_would(
    tmp_path: Path, model: LlamaForCausalLM, good: tuple[dict[str, Any], Tensors]
) -> None:
    path = write_adapter(tmp_path, *good)

    def check(directory: AdapterDir) -> AdapterFacts:
        return facts_of(load_adapter(directory, view_of(model), max_bytes=LIMIT))

    report = lint(str(path), check)
    delta = load(path, view_of(model))
    assert report.ok
    assert report.facts is not None
    facts = report.facts
    assert (facts.uid, facts.kind, facts.coverage) == (delta.uid, "lora", delta.coverage)
    assert (facts.max_rank, facts.num_parameters, facts.nbytes) == (4, delta.num_parameters, delta.nbytes)
    refused = lint(str(tmp_path / "absent"), check)
    assert not refused.ok
    assert "does not exist" in str(refused.refusal)
