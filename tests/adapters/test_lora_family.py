"""Every kind of the LoRA family equals PEFT module by module, on models with and without biases."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file
from transformers import PreTrainedModel

from loraplex.adapters.config_file import AdapterConfig
from loraplex.adapters.keys import ConfigReader
from loraplex.adapters.targets import Targets
from loraplex.adapters.tensors import PREFIX
from loraplex.errors import InvalidAdapter, LoraplexError, Mismatch, UnsupportedFeature
from tests.adapters.peft_sites import check_kind, check_sites, load, randomize, save_adapter
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


def files_of(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What an adapter directory holds."""
    return json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")


def written(**values: Any) -> AdapterConfig:
    return AdapterConfig("LORA", values, "here/adapter_config.json")


def config_of(**keys: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "task_type": "CAUSAL_LM", **keys})


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
@pytest.mark.parametrize("name", WHOLE)
def test_every_site_equals_peft(tmp_path: Path, model: PreTrainedModel, name: str) -> None:
    kind, keys = WHOLE[name]
    # PEFT counts from the prompt's end: with as many tokens as there are rows, every row is invoked
    arguments = {"alora_offsets": [1 << 20]} if kind == "alora" else None
    delta = check_kind(model, tmp_path, config_of(**keys), arguments)
    assert delta.kind == kind
    assert delta.invocation_tokens == tuple(keys.get("alora_invocation_tokens", ()))
    assert bool(delta.exclusive) is (kind == "dora")


@pytest.mark.parametrize(
    "targets", [["embed_tokens", "q_proj"], ["lm_head"], r".*(lm_head|q_proj)", ["lm_head", "embed_tokens"]], ids=str
)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_tied_adapters(tmp_path: Path, tied: PreTrainedModel, targets: list[str] | str, use_dora: bool) -> None:
    keys = {"rank_pattern": {"embed_tokens": 3, "lm_head": 4}, "alpha_pattern": {"lm_head": 9}, "use_dora": use_dora}
    delta = check_kind(tied, tmp_path, config_of(target_modules=targets, ensure_weight_tying=True, **keys))
    head, embedding = delta.sites["lm_head"].low_rank, delta.sites["model.embed_tokens"].low_rank
    assert head is not None
    assert embedding is not None
    assert torch.equal(head.a, embedding.b.T)
    assert head.rank == 3
    assert head.scale == 9 / 4  # of its own patterns, as in PEFT


def test_factors_that_should_be_tied(tmp_path: Path, tied: PreTrainedModel) -> None:
    config = config_of(target_modules=["embed_tokens"], ensure_weight_tying=True)
    save_adapter(tied, tmp_path / "good", config)
    saved, tensors = files_of(tmp_path / "good")
    key = "base_model.model.lm_head.lora_B.weight"
    other = write_adapter(tmp_path / "other", saved, tensors | {key: tensors[key] + 1})
    with pytest.raises(InvalidAdapter, match=r"factors of 'lm_head' are not those of 'model\.embed_tokens'"):
        load(other, view_of(tied))
    with pytest.raises(Mismatch, match="1 sites have tensors but are not selected"):
        load(write_adapter(tmp_path / "untied", saved | {"ensure_weight_tying": False}, tensors), view_of(tied))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_model_with_one_end_adapted(tmp_path: Path, tied: PreTrainedModel, target: str) -> None:
    """Without ``ensure_weight_tying`` PEFT changes the end that is targeted, and not the other."""
    delta = check_kind(tied, tmp_path, config_of(target_modules=[target, "q_proj"]))
    assert set(delta.coverage.sites) == {target, "q_proj"}


def test_tying_asks_for_a_tied_model(tmp_path: Path, model: PreTrainedModel) -> None:
    delta = check_kind(model, tmp_path, config_of(target_modules=["lm_head"], ensure_weight_tying=True))
    assert set(delta.sites) == {"lm_head"}


def test_saved_modules_are_not_adapted(tmp_path: Path, model: PreTrainedModel) -> None:
    """PEFT puts no adapter where ``modules_to_save`` has a module, whatever ``target_modules`` says."""
    targets = Targets(ConfigReader(written(target_modules=".*_proj", modules_to_save=["q_proj", "mlp"])).target_rule())
    with torch.device("meta"):
        adapted = peft.get_peft_model(
            tiny_model("llama"), config_of(target_modules=".*_proj", modules_to_save=["q_proj", "mlp"])
        )
    assert targets.select(sites_of(model)) == set(adapted.base_model.targeted_module_names)


# ---- biases ----


def test_a_bias_that_is_the_bases_is_no_change(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    save_adapter(model, tmp_path, config_of(target_modules=["o_proj"], bias="all"))
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
    config = config_of(target_modules=["q_proj"], bias="all", modules_to_save=["v_proj"])
    delta = check_kind(tiny_model("qwen2"), tmp_path, config)
    assert delta.coverage.changes == {"q_proj": "low rank, shift", "k_proj": "shift", "v_proj": "own weight"}


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
    save_adapter(model, tmp_path, config_of(target_modules=["q_proj"], bias="all"))
    config, tensors = files_of(tmp_path)
    left = {key: tensor for key, tensor in tensors.items() if not is_dropped(key)}
    with pytest.raises(error, match=message):
        load(write_adapter(tmp_path / "bad", config | keys, left), view_of(model))


def test_a_bias_of_another_shape(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    save_adapter(model, tmp_path, config_of(target_modules=["q_proj"], bias="lora_only"))
    config, tensors = files_of(tmp_path)
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias"
    for odd in (torch.ones(31), torch.ones(1), torch.ones(32, 1)):
        with pytest.raises(Mismatch, match=r"bias of 'model\.layers\.0\.self_attn\.q_proj' has shape"):
            load(write_adapter(tmp_path / "bad", config, tensors | {key: odd}), view_of(model))


# ---- each kind's own refusals ----

Q0 = "model.layers.0.self_attn.q_proj"
DORA = {"use_dora": True, "target_modules": ["q_proj"]}
BIASED = {"lora_bias": True, "target_modules": ["q_proj"]}
BLOCKED = {"use_bdlora": BLOCKS, "target_modules": ["q_proj"]}
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
    save_adapter(model, tmp_path, config_of(**{"r": 4, **made}))
    config, saved = files_of(tmp_path)
    changed = {**saved, **{f"{PREFIX}{Q0}.{end}": tensor for end, tensor in tensors.items()}}
    path = write_adapter(tmp_path / "bad", config | keys, {k: v for k, v in changed.items() if v is not None})
    with pytest.raises(error, match=message) as caught:
        load(path, view_of(model))
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


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
    save_adapter(model, tmp_path, config_of(target_modules=["embed_tokens"]))
    config, tensors = files_of(tmp_path)
    with pytest.raises(error, match=message) as caught:
        load(write_adapter(tmp_path / "bad", config | keys, tensors), view_of(model))
    assert caught.value.field in (*keys, "target_modules")


@pytest.mark.parametrize(
    "keys", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": [1]}], ids=str
)
def test_alora_beside_what_changes_every_token(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = tiny_model("llama")
    save_adapter(model, tmp_path, config_of(**ALORA, **keys))
    with pytest.raises(UnsupportedFeature, match="together with alora_invocation_tokens is not served") as caught:
        load(tmp_path, view_of(model))
    assert caught.value.field in keys


def test_alora_with_trained_biases(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    save_adapter(model, tmp_path, config_of(target_modules=["q_proj"], alora_invocation_tokens=[1], bias="all"))
    with pytest.raises(UnsupportedFeature, match="bias together with alora_invocation_tokens") as caught:
        load(tmp_path, view_of(model))
    assert caught.value.field == "bias"


def test_a_direction_that_is_zero(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_adapter(model, tmp_path, config_of(**DORA))
    with torch.no_grad():
        model.get_submodule(Q0).weight[3] = 0
    config, tensors = files_of(tmp_path)
    tensors[f"{PREFIX}{Q0}.lora_B.weight"][3] = 0
    with pytest.raises(InvalidAdapter, match=f"row of '{Q0}' .* has no direction"):
        load(write_adapter(tmp_path / "bad", config, tensors), view_of(model))


def test_a_magnitude_that_leaves_the_range(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_adapter(model, tmp_path, config_of(**DORA))
    config, tensors = files_of(tmp_path)
    key = f"{PREFIX}{Q0}.lora_magnitude_vector"
    huge = write_adapter(tmp_path / "huge", config, tensors | {key: tensors[key] * 1e7})
    assert load(huge, view_of(model)).kind == "dora"
    with pytest.raises(InvalidAdapter, match=r"leave the range of the base's torch\.float16"):
        load(huge, view_of(model, torch.float16))


def test_a_magnitude_under_its_newer_name(tmp_path: Path) -> None:
    """PEFT reads ``lora_magnitude_vector.weight`` too."""
    model = tiny_model("llama")
    save_adapter(model, tmp_path, config_of(**DORA))
    config, tensors = files_of(tmp_path)
    renamed = {key.replace("_vector", "_vector.weight"): tensor for key, tensor in tensors.items()}
    path = write_adapter(tmp_path / "new", config, renamed)
    check_sites(model, load_peft(copy.deepcopy(model), path), load(path, view_of(model)))


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_norms_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    model = tiny_model("llama")
    config = config_of(use_dora=True, target_modules=[target])
    whole = check_kind(model, tmp_path, config)
    monkeypatch.setattr("loraplex.adapters.kinds.dora._CHUNK_ELEMENTS", 100)
    pieces = load(tmp_path, view_of(model))
    for site, delta in whole.sites.items():
        torch.testing.assert_close(pieces.sites[site].out_scale, delta.out_scale)


def test_magnitudes_are_of_the_factors_as_saved(tmp_path: Path) -> None:
    """In a narrower base dtype the factors are rounded, the norm is not: PEFT keeps an adapter in float32."""
    model = tiny_model("llama").bfloat16()
    adapted = save_adapter(model, tmp_path, config_of(use_dora=True, target_modules=["q_proj", "lm_head"]))
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


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_a_converted_pissa(tmp_path: Path) -> None:
    """PiSSA changes the base; saved with the initial adapter it is a LoRA of twice the rank against the true base."""
    model = tiny_model("llama")
    trained = peft.get_peft_model(
        copy.deepcopy(model), config_of(target_modules=["q_proj"], r=2, init_lora_weights="pissa")
    )
    trained.peft_config["default"].init_lora_weights = True  # what PEFT asks of the initial adapter's config
    trained.save_pretrained(tmp_path / "initial")
    trained.peft_config["default"].init_lora_weights = "pissa"
    randomize(trained, 3, 0.3)
    trained.save_pretrained(tmp_path / "raw")
    trained.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    with pytest.raises(UnsupportedFeature, match="path_initial_model_for_weight_conversion") as caught:
        load(tmp_path / "raw", view_of(model))
    assert caught.value.field == "init_lora_weights"
    delta = load(tmp_path / "converted", view_of(model))
    assert delta.max_rank == 4
    check_sites(model, trained, delta)
