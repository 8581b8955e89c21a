"""AdaLoRA, VeRA, LoHa, LoKr, IA3 and LN tuning equal PEFT module by module, on models with and without biases."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from loraplex.adapters.delta import AdapterDelta
from tests.adapters.peft_sites import check_logits, check_sites, load, randomize, save_adapter
from tests.fakes_adapters import load_peft, sites_of, view_of, write_adapter
from tests.tiny import ALL_LINEAR, tiny_model

Q1 = "model.layers.1.self_attn.q_proj"
SOME = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def biased() -> PreTrainedModel:
    """A model with biases."""
    return tiny_model("qwen2")


def made(tmp_path: Path, model: PreTrainedModel, config: peft.PeftConfig, kind: str) -> AdapterDelta:
    """A random adapter of this config, found equal to PEFT's at every site and in the logits."""
    adapted = save_adapter(model, tmp_path, config)
    delta = load(tmp_path, view_of(model))
    check_sites(model, adapted, delta)
    check_logits(model, adapted, delta)
    assert delta.kind == kind
    return delta


# ---- IA3 ----

IA3: dict[str, dict[str, Any]] = {
    "as in the paper": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "outputs alone": {"target_modules": ["q_proj", "k_proj", "gate_proj"], "feedforward_modules": []},
    "inputs alone": {"target_modules": list(ALL_LINEAR), "feedforward_modules": list(ALL_LINEAR)},
    "ends of names": {"target_modules": r".*layers\.1\..*_proj", "feedforward_modules": ["p_proj"]},
    "a pattern": {"target_modules": list(ALL_LINEAR), "feedforward_modules": r".*\.0\.mlp\..*"},
    "all-linear but one": {"target_modules": "all-linear", "exclude_modules": [Q1], "feedforward_modules": ".*mlp.*"},
    "told of another layout": {"target_modules": ["q_proj"], "feedforward_modules": [], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("name", IA3)
def test_ia3(tmp_path: Path, model: PreTrainedModel, name: str) -> None:
    delta = made(tmp_path, model, peft.IA3Config(**IA3[name]), "ia3")
    assert delta.max_rank == 0
    for change in delta.sites.values():
        assert (change.in_scale is None) != (change.out_scale is None)
        assert change.shift is None
        assert not change.exclusive


# ---- LN tuning ----

LN: dict[str, list[str] | str] = {
    "norms": ["input_layernorm", "post_attention_layernorm", "norm"],
    "a pattern of norms": r".*norm",
    "linear layers": ["q_proj", "down_proj", "norm"],
    "embedding and head": ["embed_tokens", "lm_head"],
}


@pytest.mark.parametrize("name", LN)
def test_ln_tuning(tmp_path: Path, model: PreTrainedModel, name: str) -> None:
    delta = made(tmp_path, model, peft.LNTuningConfig(target_modules=LN[name]), "ln_tuning")
    assert all(change.exclusive and change.rows is not None for change in delta.sites.values())
    assert delta.max_rank == 0


@pytest.mark.parametrize("target", [["mlp", "model.norm"], r"model\.layers\.1", r"model\.layers\.\d"])
def test_a_tuned_container_covers_what_lies_in_it(tmp_path: Path, model: PreTrainedModel, target: Any) -> None:
    adapted = save_adapter(model, tmp_path, peft.LNTuningConfig(target_modules=target), strength=0.1)
    delta = load(tmp_path, view_of(model))
    check_logits(model, adapted, delta)
    inside = re.compile(target if isinstance(target, str) else "|".join(rf"(.*\.)?{name}" for name in target))
    wanted = {site.name for site in sites_of(model) if inside.match(site.name)}
    assert set(delta.sites) == wanted
    for site in sites_of(model):
        rows = delta.sites[site.name].rows if site.name in wanted else None
        assert rows is None or (rows.bias is not None) == site.bias


@pytest.mark.parametrize("change", ["another base", "a larger vocabulary"])
def test_a_tuned_embedding_over_a_base_of_its_own(tmp_path: Path, biased: PreTrainedModel, change: str) -> None:
    save_adapter(biased, tmp_path / "saved", peft.LNTuningConfig(target_modules=["embed_tokens", "lm_head"]))
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    if change == "another base":
        name = "base_model.model.model.embed_tokens.base_layer.weight"
        tensors[name] = tensors[name] + 1
    else:
        tensors = {name: torch.cat((tensor, torch.ones(2, 32))) for name, tensor in tensors.items()}
    delta = load(write_adapter(tmp_path / "changed", config, tensors), view_of(biased))
    for site in ("model.embed_tokens", "lm_head"):
        # the copy is what PEFT runs, whatever lies under it
        merged, _ = delta.sites[site].merged(biased.get_submodule(site).weight.detach(), None)
        assert torch.equal(merged, tensors[f"base_model.model.{site}.ln_tuning_layers.weight"])
    assert delta.vocab_size == (98 if change == "a larger vocabulary" else 0)


# ---- LoHa ----

LOHA: dict[str, dict[str, Any]] = {
    "default alpha": {"r": 3, "target_modules": list(ALL_LINEAR)},
    "one": {"r": 1, "alpha": 3, "target_modules": ["o_proj"]},
    # 49 is more than any side of these layers
    "more than a layer's shorter side": {"r": 7, "alpha": 2, "target_modules": list(ALL_LINEAR)},
    "patterns": {
        "r": 2,
        "alpha": 5,
        "target_modules": "all-linear",
        "exclude_modules": ["k_proj"],
        # in sorted order, which is how PEFT saves them: where several match, the first counts
        "rank_pattern": {r"layers\.1\..*": 3, "q_proj": 4},
        "alpha_pattern": {"up_proj": 11},
    },
    "one layer": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "harmless": {
        "r": 2,
        "target_modules": ["v_proj"],
        "rank_dropout": 0.5,
        "module_dropout": 0.5,
        "use_effective_conv2d": True,
        "init_weights": False,
    },
}


@pytest.mark.parametrize("name", LOHA)
def test_loha(tmp_path: Path, model: PreTrainedModel, name: str) -> None:
    delta = made(tmp_path, model, peft.LoHaConfig(**LOHA[name]), "loha")
    assert delta.max_rank <= 32


def test_loha_ranks(tmp_path: Path, biased: PreTrainedModel) -> None:
    small = made(tmp_path / "small", biased, peft.LoHaConfig(r=3, target_modules=["q_proj"]), "loha")
    assert small.sites[Q1].rank == 9
    large = made(tmp_path / "large", biased, peft.LoHaConfig(r=6, target_modules=["q_proj", "k_proj"]), "loha")
    assert large.coverage.ranks == {"q_proj": 32, "k_proj": 16}


# ---- LoKr ----

LOKR: dict[str, dict[str, Any]] = {
    "second decomposed": {"r": 2, "target_modules": list(ALL_LINEAR)},
    "both whole": {"r": 8, "alpha": 3, "target_modules": list(ALL_LINEAR)},
    "both decomposed": {"r": 1, "decompose_both": True, "target_modules": list(ALL_LINEAR)},
    "a factor that divides": {"r": 2, "decompose_factor": 8, "target_modules": list(ALL_LINEAR)},
    "a factor that does not": {"r": 2, "decompose_factor": 5, "decompose_both": True, "target_modules": SOME},
    "a factor of all": {"r": 3, "decompose_factor": 32, "target_modules": ["q_proj", "up_proj"]},
    "a factor of none": {"r": 2, "decompose_factor": 1, "target_modules": ["q_proj", "up_proj"]},
    "a rank above a side": {"r": 7, "decompose_factor": 2, "target_modules": ["k_proj", "gate_proj"]},
    "patterns": {
        "r": 2,
        "alpha": 5,
        "target_modules": r".*_proj",
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {r"layers\.1\..*": 11},
        "init_weights": "lycoris",
        "rank_dropout_scale": True,
    },
}


@pytest.mark.parametrize("name", LOKR)
def test_lokr(tmp_path: Path, model: PreTrainedModel, name: str) -> None:
    made(tmp_path, model, peft.LoKrConfig(**LOKR[name]), "lokr")


def test_lokr_ranks(tmp_path: Path, biased: PreTrainedModel) -> None:
    # q_proj is 32 x 32: w1 4 x 4, w2 8 x 8
    some = made(tmp_path / "some", biased, peft.LoKrConfig(r=2, target_modules=["q_proj"]), "lokr")
    assert some.max_rank == 4 * 2
    both = peft.LoKrConfig(r=1, decompose_both=True, target_modules=["q_proj"])
    assert made(tmp_path / "both", biased, both, "lokr").max_rank == 1
    assert made(tmp_path / "whole", biased, peft.LoKrConfig(r=4, target_modules=["q_proj"]), "lokr").max_rank == 32


# ---- VeRA ----

VERA: dict[str, dict[str, Any]] = {
    "of many shapes": {"r": 12, "target_modules": list(ALL_LINEAR)},
    "drawn again": {"r": 12, "target_modules": list(ALL_LINEAR), "save_projection": False},
    "drawn by another key": {
        "r": 5,
        "target_modules": ["k_proj", "up_proj"],
        "save_projection": False,
        "projection_prng_key": 2**40 + 7,
        "d_initial": 0.7,
    },
    "of some layers": {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1]},
    "biases of its layers": {"r": 4, "target_modules": ["q_proj", "down_proj"], "bias": "vera_only"},
    "all biases": {"r": 4, "target_modules": ["q_proj", "down_proj"], "bias": "all", "vera_dropout": 0.3},
}


@pytest.mark.parametrize("name", VERA)
def test_vera(tmp_path: Path, model: PreTrainedModel, name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not")
        delta = made(tmp_path, model, peft.VeraConfig(**VERA[name]), "vera")
    assert delta.max_rank == VERA[name]["r"]
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert ("base_model.vera_A" in names) == VERA[name].get("save_projection", True)


# ---- AdaLoRA ----

ADALORA: dict[str, dict[str, Any]] = {
    "plain": {"init_r": 5, "lora_alpha": 7, "target_modules": list(ALL_LINEAR)},
    "alpha below zero": {"init_r": 5, "lora_alpha": -1, "target_modules": ["q_proj"]},
    "keys of LoRA that it does not look at": {
        "init_r": 3,
        "target_modules": ["q_proj", "up_proj"],
        "alpha_pattern": {"q_proj": 99},
        "use_rslora": True,
        "lora_bias": False,
        "lora_dropout": 0.2,
        "orth_reg_weight": 0.1,
    },
    "all biases": {"init_r": 3, "target_modules": ["q_proj", "down_proj"], "bias": "all"},
    "biases of its layers": {"init_r": 3, "target_modules": ["q_proj", "down_proj"], "bias": "lora_only"},
}


@pytest.mark.parametrize("name", ADALORA)
def test_adalora(tmp_path: Path, model: PreTrainedModel, name: str) -> None:
    delta = made(tmp_path, model, peft.AdaLoraConfig(total_step=10, **ADALORA[name]), "adalora")
    assert delta.max_rank == ADALORA[name]["init_r"]


@pytest.mark.parametrize("alpha", [7, 0])
def test_adalora_after_its_ranks_were_shared_out(tmp_path: Path, model: PreTrainedModel, alpha: int) -> None:
    config = peft.AdaLoraConfig(total_step=10, init_r=4, lora_alpha=alpha, target_modules=SOME)
    kept = {Q1: [True, False, True, False], "model.layers.0.mlp.up_proj": [False] * 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        randomize(adapted, seed=3, strength=0.3)
        pattern = {f"{name}.lora_E.default": flags for name, flags in kept.items()}
        adapted.peft_config["default"].rank_pattern = pattern
        adapted.save_pretrained(tmp_path)
    adapted = load_peft(copy.deepcopy(model), tmp_path).eval()
    delta = load(tmp_path, view_of(model))
    check_sites(model, adapted, delta)
    check_logits(model, adapted, delta)
    assert delta.sites[Q1].rank == 2
    assert "model.layers.0.mlp.up_proj" not in delta.sites
    # PEFT takes names with and without the adapter's own behind them
    config_file = tmp_path / "adapter_config.json"
    values = json.loads(config_file.read_text())
    assert set(values["rank_pattern"]) == {f"{name}.lora_E" for name in kept}
    values["rank_pattern"] = pattern
    config_file.write_text(json.dumps(values))
    again = load(tmp_path, view_of(model))
    torch.testing.assert_close(
        again.sites[Q1].merged(torch.zeros(32, 32), None)[0], delta.sites[Q1].merged(torch.zeros(32, 32), None)[0]
    )


# ---- all of them ----

EACH: dict[str, peft.PeftConfig] = {
    "adalora": peft.AdaLoraConfig(total_step=10, init_r=4, target_modules=SOME),
    "vera": peft.VeraConfig(r=6, target_modules=SOME),
    "loha": peft.LoHaConfig(r=2, target_modules=SOME),
    "lokr": peft.LoKrConfig(r=2, target_modules=SOME),
    "ia3": peft.IA3Config(target_modules=SOME, feedforward_modules=["down_proj"]),
    "ln_tuning": peft.LNTuningConfig(target_modules=["norm", "q_proj"]),
}


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_rounded_once(tmp_path: Path, biased: PreTrainedModel, kind: str, dtype: torch.dtype) -> None:
    save_adapter(biased, tmp_path, EACH[kind])
    exact, rounded = load(tmp_path, view_of(biased)), load(tmp_path, view_of(biased, dtype))
    assert set(exact.sites) == set(rounded.sites)
    for name, change in rounded.sites.items():
        for got, want in zip(change.tensors, exact.sites[name].tensors, strict=True):
            assert torch.equal(got, want if got.dtype == torch.float32 else want.to(dtype))
        if change.low_rank is not None:
            assert change.low_rank.a.dtype == change.low_rank.b.dtype == dtype


@pytest.mark.parametrize("kind", [kind for kind in EACH if kind != "ln_tuning"])
def test_the_head_alone(tmp_path: Path, biased: PreTrainedModel, kind: str) -> None:
    config = copy.deepcopy(EACH[kind])
    config.target_modules = {"lm_head", "q_proj"}
    if kind == "ia3":
        config.feedforward_modules = {"lm_head"}
    delta = made(tmp_path, biased, config, kind)
    assert delta.coverage.sites == {"lm_head": 1, "q_proj": 2}


@pytest.mark.parametrize("kind", [kind for kind in EACH if kind != "ln_tuning"])
def test_a_tied_head(tmp_path: Path, kind: str) -> None:
    config = copy.deepcopy(EACH[kind])
    config.target_modules = {"lm_head", "q_proj"}
    if kind == "ia3":
        config.feedforward_modules = {"q_proj"}
    delta = made(tmp_path, tiny_model("llama", tie_word_embeddings=True), config, kind)
    assert delta.coverage.sites == {"lm_head": 1, "q_proj": 2}


@pytest.mark.parametrize("kind", EACH)
def test_beside_a_saved_module(tmp_path: Path, biased: PreTrainedModel, kind: str) -> None:
    config = copy.deepcopy(EACH[kind])
    config.modules_to_save = ["lm_head", "k_proj"]
    delta = made(tmp_path, biased, config, kind)
    assert delta.coverage.changes["lm_head"] == "own weight"
    assert delta.exclusive["lm_head"] == "a saved module"
    assert {"k_proj", "q_proj"} <= set(delta.coverage.sites)


def test_adalora_beside_trained_tokens(tmp_path: Path, biased: PreTrainedModel) -> None:
    config = copy.deepcopy(EACH["adalora"])
    config.trainable_token_indices = [5, 7]
    delta = made(tmp_path, biased, config, "adalora")
    assert delta.coverage.changes["embed_tokens"] == "own rows"


#: keys that a kind takes for harmless, with values that would change what LoRA computes
NOT_LOOKED_AT: dict[str, dict[str, Any]] = {
    "adalora": {
        "r": 99,
        "alpha_pattern": {"q_proj": 99},
        "use_rslora": True,
        "lora_bias": True,
        "init_lora_weights": False,
        "fan_in_fan_out": True,
    },
    "vera": {"fan_in_fan_out": True, "init_weights": False, "d_initial": 3.0},
    "loha": {"use_effective_conv2d": True, "init_weights": False},
    "lokr": {"use_effective_conv2d": True, "init_weights": "lycoris"},
    "ia3": {"fan_in_fan_out": True, "init_ia3_weights": False},
}


@pytest.mark.parametrize("kind", NOT_LOOKED_AT)
def test_what_is_harmless_changes_nothing(tmp_path: Path, biased: PreTrainedModel, kind: str) -> None:
    save_adapter(biased, tmp_path, EACH[kind])
    config_file = tmp_path / "adapter_config.json"
    values = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(values | NOT_LOOKED_AT[kind]))
    adapted = load_peft(copy.deepcopy(biased), tmp_path).eval()
    check_sites(biased, adapted, load(tmp_path, view_of(biased)))
