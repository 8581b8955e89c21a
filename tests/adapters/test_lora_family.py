"""Every kind of the LoRA family equals PEFT module by module, on models with and without biases."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig
from transformers import PreTrainedModel

from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import ConfigReader
from loraplex.adapters.reading.targets import Targets
from loraplex.adapters.reading.tensors import PREFIX
from loraplex.errors import UnsupportedFeature
from tests.adapters.peft_sites import check_kind, check_sites, files_of, load, lora_config, randomize, save_adapter
from tests.fakes_adapters import load_peft, sites_of, view_of, write_adapter
from tests.tiny import ALL_LINEAR, tiny_model

EVERYTHING = [*ALL_LINEAR, "embed_tokens", "lm_head"]
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 5, r".*layers\.1\..*up_proj": 3},
    "alpha_pattern": {"layers.0.mlp.down_proj": 7, "o_proj|lm_head": 3},
}
BLOCKS = BdLoraConfig(
    target_modules_bd_a=["o_proj", "down_proj"],
    target_modules_bd_b=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
    nblocks=2,
)
SOME_BLOCKS = BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=4, match_strict=False)
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"target_modules": EVERYTHING, **PATTERNS}),
    "rslora": ("rslora", {"target_modules": EVERYTHING, "use_rslora": True, **PATTERNS}),
    "lora_bias": ("lora", {"target_modules": [*ALL_LINEAR, "lm_head"], "lora_bias": True, **PATTERNS}),
    "lora_bias rslora": ("rslora", {"target_modules": ["q_proj"], "lora_bias": True, "use_rslora": True}),
    "bias all": ("lora", {"target_modules": ["q_proj", "o_proj", "embed_tokens"], "bias": "all"}),
    "bias lora_only": ("lora", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "both biases": ("lora", {"target_modules": ["k_proj", "o_proj"], "bias": "all", "lora_bias": True}),
    "fan_in_fan_out": ("lora", {"target_modules": ["embed_tokens"], "fan_in_fan_out": True}),
    "one layer": ("lora", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}),
    "layers": (
        "lora",
        {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": "layers", "bias": "lora_only"},
    ),
    "exclude": ("lora", {"target_modules": r".*_proj", "exclude_modules": r".*0\..*(q|k)_proj"}),
    "mica": ("lora", {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"}),
    "orthogonal": ("lora", {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "orthogonal"}),
    "gaussian": ("lora", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "dora": ("dora", {"target_modules": EVERYTHING, "use_dora": True, **PATTERNS}),
    "dora rslora": ("dora", {"target_modules": EVERYTHING, "use_dora": True, "use_rslora": True, **PATTERNS}),
    "dora bias": ("dora", {"target_modules": ["q_proj", "v_proj", "o_proj"], "use_dora": True, "bias": "all"}),
    "dora embedding": ("dora", {"target_modules": ["embed_tokens"], "use_dora": True, "fan_in_fan_out": True}),
    "bdlora": ("bdlora", {"target_modules": list(ALL_LINEAR), "r": 4, "use_bdlora": BLOCKS}),
    "bdlora rslora": ("bdlora", {"target_modules": ["o_proj"], "r": 4, "use_bdlora": BLOCKS, "use_rslora": True}),
    "bdlora and lora": (
        "bdlora",
        {
            "target_modules": ["q_proj", "o_proj", "v_proj"],
            "use_bdlora": SOME_BLOCKS,
            "rank_pattern": {"q_proj": 8},
            "lora_bias": True,
            "bias": "lora_only",
        },
    ),
    "alora": ("alora", {"target_modules": [*ALL_LINEAR, "lm_head"], "alora_invocation_tokens": [7, 8, 7]}),
    "alora rslora": (
        "alora",
        {"target_modules": ["q_proj"], "alora_invocation_tokens": [95], "use_rslora": True, "lora_bias": True},
    ),
    "no alora": ("lora", {"target_modules": ["q_proj"], "alora_invocation_tokens": []}),
}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.set_num_threads(1)
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def tied() -> PreTrainedModel:
    return tiny_model("qwen2", tie_word_embeddings=True)


def written(**values: Any) -> AdapterConfig:
    return AdapterConfig("LORA", values, "here/adapter_config.json")


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
@pytest.mark.parametrize("name", WHOLE)
def test_every_site_equals_peft(tmp_path: Path, model: PreTrainedModel, name: str) -> None:
    kind, keys = WHOLE[name]
    # PEFT counts from the prompt's end: with as many tokens as there are rows, every row is invoked
    arguments = {"alora_offsets": [1 << 20]} if kind == "alora" else None
    delta = check_kind(model, tmp_path, lora_config(**keys), arguments)
    assert delta.kind == kind
    assert delta.invocation_tokens == tuple(keys.get("alora_invocation_tokens", ()))
    assert bool(delta.exclusive) is (kind == "dora")


@pytest.mark.parametrize(
    "targets", [["embed_tokens", "q_proj"], ["lm_head"], r".*(lm_head|q_proj)", ["lm_head", "embed_tokens"]], ids=str
)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_tied_adapters(tmp_path: Path, tied: PreTrainedModel, targets: list[str] | str, use_dora: bool) -> None:
    keys = {"rank_pattern": {"embed_tokens": 3, "lm_head": 4}, "alpha_pattern": {"lm_head": 9}, "use_dora": use_dora}
    delta = check_kind(tied, tmp_path, lora_config(target_modules=targets, ensure_weight_tying=True, **keys))
    head, embedding = delta.sites["lm_head"].low_rank, delta.sites["model.embed_tokens"].low_rank
    assert head is not None
    assert embedding is not None
    assert torch.equal(head.a, embedding.b.T)
    assert head.rank == 3
    assert head.scale == 9 / 4  # of its own patterns, as in PEFT


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_model_with_one_end_adapted(tmp_path: Path, tied: PreTrainedModel, target: str) -> None:
    """Without ``ensure_weight_tying`` PEFT changes the end that is targeted, and not the other."""
    delta = check_kind(tied, tmp_path, lora_config(target_modules=[target, "q_proj"]))
    assert set(delta.coverage.sites) == {target, "q_proj"}


def test_tying_asks_for_a_tied_model(tmp_path: Path, model: PreTrainedModel) -> None:
    delta = check_kind(model, tmp_path, lora_config(target_modules=["lm_head"], ensure_weight_tying=True))
    assert set(delta.sites) == {"lm_head"}


def test_saved_modules_are_not_adapted(tmp_path: Path, model: PreTrainedModel) -> None:
    """PEFT puts no adapter where ``modules_to_save`` has a module, whatever ``target_modules`` says."""
    targets = Targets(ConfigReader(written(target_modules=".*_proj", modules_to_save=["q_proj", "mlp"])).target_rule())
    with torch.device("meta"):
        adapted = peft.get_peft_model(
            tiny_model("llama"), lora_config(target_modules=".*_proj", modules_to_save=["q_proj", "mlp"])
        )
    assert targets.select(sites_of(model)) == set(adapted.base_model.targeted_module_names)


# ---- biases ----


def test_a_bias_that_is_the_bases_is_no_change(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    save_adapter(model, tmp_path, lora_config(target_modules=["o_proj"], bias="all"))
    config, tensors = files_of(tmp_path)
    same = {key: model.get_parameter(key.removeprefix(PREFIX)).detach() for key in tensors if key.endswith(".bias")}
    assert len(same) == 6
    delta = load(write_adapter(tmp_path / "same", config, tensors | same), view_of(model))
    assert set(delta.coverage.sites) == {"o_proj"}
    one = f"{PREFIX}model.layers.1.self_attn.k_proj.bias"
    delta = load(write_adapter(tmp_path / "one", config, tensors | same | {one: same[one] + 1}), view_of(model))
    assert delta.sites[one.removeprefix(PREFIX).removesuffix(".bias")].change() == "shift"
    assert delta.coverage.sites == {"o_proj": 2, "k_proj": 1}


def test_biases_beside_a_saved_module(tmp_path: Path) -> None:
    """PEFT saves such a module's bias three times; the one under its own name is the trained one."""
    config = lora_config(target_modules=["q_proj"], bias="all", modules_to_save=["v_proj"])
    delta = check_kind(tiny_model("qwen2"), tmp_path, config)
    assert delta.coverage.changes == {"q_proj": "low rank, shift", "k_proj": "shift", "v_proj": "own weight"}


def test_a_magnitude_under_its_newer_name(tmp_path: Path) -> None:
    """PEFT reads ``lora_magnitude_vector.weight`` too."""
    model = tiny_model("llama")
    save_adapter(model, tmp_path, lora_config(use_dora=True, target_modules=["q_proj"]))
    config, tensors = files_of(tmp_path)
    renamed = {key.replace("_vector", "_vector.weight"): tensor for key, tensor in tensors.items()}
    path = write_adapter(tmp_path / "new", config, renamed)
    check_sites(model, load_peft(copy.deepcopy(model), path), load(path, view_of(model)))


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_norms_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    model = tiny_model("llama")
    config = lora_config(use_dora=True, target_modules=[target])
    whole = check_kind(model, tmp_path, config)
    monkeypatch.setattr("loraplex.adapters.norms._CHUNK_ELEMENTS", 100)
    pieces = load(tmp_path, view_of(model))
    for site, delta in whole.sites.items():
        torch.testing.assert_close(pieces.sites[site].out_scale, delta.out_scale)


def test_magnitudes_are_of_the_factors_as_saved(tmp_path: Path) -> None:
    """In a narrower base dtype the factors are rounded, the norm is not: PEFT keeps an adapter in float32."""
    model = tiny_model("llama").bfloat16()
    adapted = save_adapter(model, tmp_path, lora_config(use_dora=True, target_modules=["q_proj", "lm_head"]))
    delta = load(tmp_path, view_of(model, torch.bfloat16))
    for site, change in delta.sites.items():
        layer = adapted.get_base_model().get_submodule(site)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert product.dtype == torch.float32
        magnitude = layer.lora_magnitude_vector["default"]
        norm = magnitude.get_weight_norm(layer.base_layer.weight.float(), product, layer.scaling["default"])
        assert change.low_rank is not None
        assert change.low_rank.a.dtype == torch.bfloat16
        torch.testing.assert_close(change.out_scale, (magnitude.weight / norm).detach())


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning")
@pytest.mark.parametrize(
    ("init", "keys"),
    [("pissa", {}), ("pissa_niter_4", {"use_rslora": True}), ("olora", {"rank_pattern": {"q_proj": 5}})],
    ids=str,
)
def test_a_converted_init(tmp_path: Path, init: str, keys: dict[str, Any]) -> None:
    """Such inits change the base; saved with the initial adapter it is a LoRA of twice the rank on the true base."""
    model = tiny_model("llama")
    config = lora_config(target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=init, **keys)
    trained = peft.get_peft_model(copy.deepcopy(model), config)
    trained.peft_config["default"].init_lora_weights = True  # what PEFT asks of the initial adapter's config
    trained.save_pretrained(tmp_path / "initial")
    trained.peft_config["default"].init_lora_weights = init
    randomize(trained, 3, 0.3)
    trained.save_pretrained(tmp_path / "raw")
    trained.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    with pytest.raises(UnsupportedFeature, match="path_initial_model_for_weight_conversion") as caught:
        load(tmp_path / "raw", view_of(model))
    assert caught.value.field == "init_lora_weights"
    delta = load(tmp_path / "converted", view_of(model))
    assert delta.max_rank == (10 if "rank_pattern" in keys else 4)
    check_sites(model, trained, delta)
