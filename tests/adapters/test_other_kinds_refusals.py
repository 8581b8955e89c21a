"""What is wrong with an adapter of one of the other kinds is refused by name, and changes nothing."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.load import load_adapter
from loraplex.adapters.reading.source import any_directory
from loraplex.errors import InvalidAdapter, LoraplexError, Mismatch, OverCapacity, UnsupportedFeature
from loraplex.models.sites import Site, SiteKind
from tests.adapters.peft_sites import load, save_adapter
from tests.fakes_adapters import view_of, write_adapter
from tests.tiny import tiny_model

Tensors = dict[str, torch.Tensor]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.norm"
SOME = ["q_proj", "up_proj"]
EACH: dict[str, peft.PeftConfig] = {
    "adalora": peft.AdaLoraConfig(total_step=10, init_r=4, target_modules=SOME),
    "vera": peft.VeraConfig(r=6, target_modules=SOME),
    "loha": peft.LoHaConfig(r=2, target_modules=SOME),
    "lokr": peft.LoKrConfig(r=2, target_modules=SOME),
    "ia3": peft.IA3Config(target_modules=SOME, feedforward_modules=["up_proj"]),
    "ln_tuning": peft.LNTuningConfig(target_modules=["norm", "q_proj"]),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen2")


Saved = dict[str, tuple[dict[str, Any], Tensors]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel) -> Saved:
    """Kind -> a good adapter's config and tensors."""
    found = {}
    for kind, config in EACH.items():
        path = tmp_path_factory.mktemp(kind)
        save_adapter(model, path, config)
        values = json.loads((path / "adapter_config.json").read_text())
        found[kind] = values, load_file(path / "adapter_model.safetensors")
    return found


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key not in names}


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """The tensors with one of them changed, which must be there."""
    return lambda tensors: {**tensors, name: change(tensors[name])}


def same(tensors: Tensors) -> Tensors:
    return tensors


def wider(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor, tensor[..., :1]), -1)


def taller(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor, tensor[:1]))


Case = tuple[str, Callable[[Tensors], Tensors], dict[str, Any], type[LoraplexError], str]
CASES: dict[str, Case] = {
    # one part of a site is missing
    "adalora without E": ("adalora", without(f"{Q0}.lora_E"), {}, InvalidAdapter, "has no lora_E"),
    "adalora without B": ("adalora", without(f"{Q0}.lora_B"), {}, InvalidAdapter, "has no lora_B"),
    "vera without lambda_d": ("vera", without(f"{Q0}.vera_lambda_d"), {}, InvalidAdapter, "has no vera_lambda_d"),
    "loha without w2_b": ("loha", without(f"{Q0}.hada_w2_b"), {}, InvalidAdapter, "has no hada_w2_b"),
    "lokr without w1": ("lokr", without(f"{Q0}.lokr_w1"), {}, InvalidAdapter, "has no lokr_w1"),
    "lokr without w2_a": ("lokr", without(f"{Q0}.lokr_w2_a"), {}, InvalidAdapter, "has no lokr_w2_a"),
    "ln tuning without a bias": (
        "ln_tuning",
        without(f"{Q0}.ln_tuning_layers.bias"),
        {},
        Mismatch,
        "there is no bias of 'model.layers.0.self_attn.q_proj'",
    ),
    "ln tuning without a module": (
        "ln_tuning",
        without(f"{NORM}.ln_tuning_layers.weight"),
        {},
        Mismatch,
        "only part of the adapter lands: there is no weight of 'model.norm'",
    ),
    # a whole site is missing
    "ia3 without a site": (
        "ia3",
        without(f"{Q0}.ia3_l"),
        {},
        Mismatch,
        "of 4 sites that target_modules selects, 1 have no tensors: model.layers.0.self_attn.q_proj",
    ),
    # shapes: of the config's making, and of another base's
    "adalora of another rank": (
        "adalora",
        same,
        {"init_r": 5},
        InvalidAdapter,
        "lora_A of 'model.layers.0.self_attn.q_proj' has shape [4, 32], expected [5, 32]: adapter_config.json",
    ),
    "adalora of another base": ("adalora", changed(f"{Q0}.lora_A", wider), {}, Mismatch, "for another base model"),
    "vera of another rank": ("vera", same, {"r": 5}, InvalidAdapter, "adapter_config.json says r=5"),
    "vera lambdas of another rank": (
        "vera",
        changed(f"{Q0}.vera_lambda_d", taller),
        {},
        InvalidAdapter,
        "vera_lambda_d of 'model.layers.0.self_attn.q_proj' has shape [7], expected [6]",
    ),
    "vera lambdas of another base": ("vera", changed(f"{Q0}.vera_lambda_b", taller), {}, Mismatch, "has shape [33]"),
    "vera projections of another base": (
        "vera",
        changed("base_model.vera_A", lambda a: a[:, :-1].contiguous()),
        {},
        Mismatch,
        "base_model.vera_A has shape [6, 31], expected [6, 32]",
    ),
    "loha of another rank": ("loha", same, {"r": 3}, InvalidAdapter, "has shape [32, 2], expected [32, 3]"),
    "loha of another base": ("loha", changed(f"{Q0}.hada_w1_b", wider), {}, Mismatch, "has shape [2, 33]"),
    "lokr of another rank": ("lokr", same, {"r": 3}, InvalidAdapter, "lokr_w2_a of"),
    "lokr of another factor": ("lokr", same, {"decompose_factor": 2}, InvalidAdapter, "lokr_w1 of"),
    "lokr decomposed otherwise": ("lokr", same, {"decompose_both": True, "r": 1}, InvalidAdapter, "has no lokr_w1_a"),
    "ia3 of another base": ("ia3", changed(f"{Q0}.ia3_l", taller), {}, Mismatch, "has shape [33, 1]"),
    "ia3 of the other side": ("ia3", same, {"feedforward_modules": []}, Mismatch, "expected [48, 1]"),
    "ia3 without an axis": ("ia3", changed(f"{Q0}.ia3_l", torch.flatten), {}, InvalidAdapter, "has shape [32]"),
    "ln tuning of another base": (
        "ln_tuning",
        changed(f"{NORM}.ln_tuning_layers.weight", taller),
        {},
        Mismatch,
        "the weight of 'model.norm' has shape [33], expected [32]",
    ),
    "ln tuning with a bias too many": (
        "ln_tuning",
        lambda t: {**t, f"{NORM}.ln_tuning_layers.bias": torch.ones(32)},
        {},
        Mismatch,
        "'model.norm' has a bias here, and none in the base model",
    ),
    "ln tuning of a copy in a copy": (
        "ln_tuning",
        lambda t: {
            **t,
            "base_model.model.model.layers.0.self_attn.ln_tuning_layers.x.q_proj.weight": torch.ones(32, 32),
        },
        {},
        InvalidAdapter,
        "two tensors for model.layers.0.self_attn.q_proj.weight",
    ),
    # VeRA's projections
    "vera without projections": ("vera", without("base_model.vera_B"), {}, InvalidAdapter, "vera_B is missing; save"),
    "vera with projections to spare": ("vera", same, {"save_projection": False}, Mismatch, "base_model.vera_A"),
    "a huge key": (
        "vera",
        without("base_model.vera_A", "base_model.vera_B"),
        {"save_projection": False, "projection_prng_key": 1 << 64},
        InvalidAdapter,
        "projection_prng_key is 18446744073709551616; expected an integer of at most 64 bits",
    ),
    "a key that is none": (
        "vera",
        without("base_model.vera_A", "base_model.vera_B"),
        {"save_projection": False, "projection_prng_key": "0"},
        InvalidAdapter,
        "projection_prng_key is '0'",
    ),
    "vera of another method's biases": ("vera", same, {"bias": "lora_only"}, InvalidAdapter, "bias is 'lora_only'"),
    # ranks that do not fit
    "lokr of a rank past all bounds": ("lokr", same, {"r": 4097}, InvalidAdapter, "r is 4097"),
    "alpha 0": ("loha", same, {"alpha": 0}, InvalidAdapter, "alpha is 0"),
    "r 0": ("lokr", same, {"r": 0}, InvalidAdapter, "r is 0"),
    # IA3's feed-forward modules
    "feed-forward modules that are no targets": (
        "ia3",
        same,
        {"feedforward_modules": ["down_proj"]},
        InvalidAdapter,
        "feedforward_modules names modules that target_modules does not",
    ),
    "no feed-forward modules": (
        "ia3",
        same,
        {"feedforward_modules": None},
        InvalidAdapter,
        "feedforward_modules is missing",
    ),
    "a hostile pattern": ("ia3", same, {"feedforward_modules": "(a"}, InvalidAdapter, "feedforward_modules: "),
    # AdaLoRA's ranks
    "ranks of another site": (
        "adalora",
        same,
        {"rank_pattern": {"model.layers.7.self_attn.q_proj.lora_E": [True] * 4}},
        Mismatch,
        "rank_pattern names 'model.layers.7.self_attn.q_proj', which is no targeted site",
    ),
    "ranks of no site": (
        "adalora",
        same,
        {"rank_pattern": {"q_proj": [True] * 4}},
        InvalidAdapter,
        "rank_pattern['q_proj']: expected",
    ),
    "ranks that are numbers": (
        "adalora",
        same,
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": 4}},
        InvalidAdapter,
        "a list of 4 flags",
    ),
    "ranks of another number": (
        "adalora",
        same,
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 5}},
        InvalidAdapter,
        "a list of 4 flags",
    ),
    "ranks that were not saved so": (
        "adalora",
        same,
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, False] * 2}},
        InvalidAdapter,
        "has shape [4, 32], expected [2, 32]",
    ),
    "adalora with DoRA": ("adalora", same, {"use_dora": True}, UnsupportedFeature, "use_dora=True is not served"),
    # what LN tuning targets
    "ln tuning of a module that is not targeted": (
        "ln_tuning",
        lambda t: {**t, "base_model.model.model.layers.0.input_layernorm.ln_tuning_layers.weight": torch.ones(32)},
        {},
        Mismatch,
        "does not select: model.layers.0.input_layernorm",
    ),
    "ln tuning of a parameter that is none": (
        "ln_tuning",
        lambda t: {**t, f"{NORM}.ln_tuning_layers.variance": torch.ones(32)},
        {},
        Mismatch,
        "1 tensors land nowhere: model.norm.variance",
    ),
    "ln tuning of nothing": ("ln_tuning", same, {"target_modules": ["no_such"]}, Mismatch, "does not select: "),
}


@pytest.mark.parametrize("name", CASES)
def test_refusals(tmp_path: Path, model: PreTrainedModel, saved: Saved, name: str) -> None:
    kind, change, values, error, message = CASES[name]
    config, tensors = saved[kind]
    path = write_adapter(tmp_path, config | values, change(tensors))
    with pytest.raises(error) as caught:
        load(path, view_of(model))
    assert type(caught.value) is error
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def last_of(tensors: Tensors) -> str:
    return [key for key in tensors if key.startswith(Q0)][-1]


def loaded(tmp_path: Path, model: PreTrainedModel, config: dict[str, Any], tensors: Tensors) -> None:
    load(write_adapter(tmp_path, config, tensors), view_of(model))


@pytest.mark.parametrize("kind", EACH)
def test_refusals_of_every_kind(tmp_path: Path, model: PreTrainedModel, saved: Saved, kind: str) -> None:
    config, good = saved[kind]
    name = last_of(good)
    loaded(tmp_path / "good", model, config, good)
    part = name.removeprefix(Q0)
    elsewhere = {**good, f"{Q0.replace('q_proj', 'k_proj')}{part}": good[name]}
    with pytest.raises(Mismatch, match=r"does not select|land nowhere"):
        loaded(tmp_path / "elsewhere", model, config, elsewhere)
    with pytest.raises(Mismatch, match=r"layers\.9"):
        loaded(tmp_path / "layer", model, config, {**good, f"{Q0.replace('0', '9')}{part}": good[name]})
    for stray in (f"{Q0}.lora_magnitude_vector.weight", f"{Q0}.surprise", "surprise"):
        with pytest.raises(Mismatch, match="land nowhere"):
            loaded(tmp_path / stray.replace(".", "_"), model, config, {**good, stray: torch.ones(1)})
    for value in (float("nan"), float("inf")):
        spoiled = good[name].clone()
        spoiled.flatten()[0] = value
        with pytest.raises(InvalidAdapter, match="holds NaN or Inf"):
            loaded(tmp_path / str(value), model, config, {**good, name: spoiled})
    nowhere = {"target_modules": ["no_such"], **({"feedforward_modules": []} if kind == "ia3" else {})}
    with pytest.raises(Mismatch, match=r"'no_such' matches none|does not select"):
        loaded(tmp_path / "no", model, config | nowhere, good)
    whole = (tmp_path / "good" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InvalidAdapter, match="I64"):
        load(write_adapter(tmp_path / "int", config, save({**good, name: good[name].long()})), view_of(model))
    with pytest.raises(InvalidAdapter):
        load(write_adapter(tmp_path / "cut", config, whole[:-1]), view_of(model))
    with pytest.raises(UnsupportedFeature, match="task_type='SEQ_CLS'"):
        loaded(tmp_path / "task", model, config | {"task_type": "SEQ_CLS"}, good)
    with pytest.raises(InvalidAdapter, match="unknown key 'surprise'"):
        loaded(tmp_path / "key", model, config | {"surprise": 1}, good)


@pytest.mark.parametrize("kind", [kind for kind in EACH if kind != "ln_tuning"])
def test_only_linear_layers_are_adapted(tmp_path: Path, model: PreTrainedModel, saved: Saved, kind: str) -> None:
    config, tensors = saved[kind]
    targets = {"target_modules": [*SOME, "embed_tokens", "input_layernorm"]}
    with pytest.raises(Mismatch, match=r"no linear layers.*: model\.embed_tokens, model\.layers\.0\.input_layernorm"):
        loaded(tmp_path, model, config | targets, tensors)


WIDE = Site("model.layers.0.self_attn.q_proj", SiteKind.LINEAR, 8192, 8192)


def wide_view() -> BaseView:
    def nothing(site: str) -> torch.Tensor:
        raise AssertionError(f"nobody needs the weight of {site}")

    return BaseView((WIDE,), torch.float32, nothing, nothing, tied=False, vocab_size=8)


@pytest.mark.parametrize(
    ("config", "shapes", "message"),
    [
        (
            {"peft_type": "LOHA", "r": 65},
            {"hada_w1_a": (8192, 65), "hada_w1_b": (65, 8192), "hada_w2_a": (8192, 65), "hada_w2_b": (65, 8192)},
            "LoHa of rank 65 at 'model.layers.0.self_attn.q_proj' (8192 x 8192) has an exact low-rank form of rank 4225"
            "; at most 4096 is served",
        ),
        (
            {"peft_type": "LOKR", "r": 64},
            {"lokr_w1": (64, 64), "lokr_w2": (128, 128)},
            "LoKr at 'model.layers.0.self_attn.q_proj' has an exact low-rank form of rank 8192 (64 of w1 by 128 of w2)"
            "; at most 4096 is served",
        ),
    ],
    ids=["loha", "lokr"],
)
def test_what_does_not_fit_is_refused_in_numbers(
    tmp_path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, int]], message: str
) -> None:
    tensors = {f"{Q0}.{part}": torch.ones(shape) for part, shape in shapes.items()}
    path = write_adapter(tmp_path, {**config, "target_modules": ["q_proj"]}, save(tensors))
    with pytest.raises(UnsupportedFeature) as caught:
        load(path, wide_view())
    assert message in str(caught.value)
    assert caught.value.field == "r"


@pytest.mark.parametrize("kind", EACH)
def test_a_kind_that_changes_nothing_is_refused(tmp_path: Path, model: PreTrainedModel, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(EACH[kind])).save_pretrained(tmp_path)
    with pytest.raises(InvalidAdapter, match="the adapter changes nothing"):
        load(tmp_path, view_of(model))


@pytest.mark.parametrize("kind", ["adalora", "vera", "loha", "lokr", "ln_tuning"])
def test_values_out_of_the_range_of_the_dtype(tmp_path: Path, model: PreTrainedModel, saved: Saved, kind: str) -> None:
    config, tensors = saved[kind]
    path = write_adapter(tmp_path, config, {**tensors, last_of(tensors): tensors[last_of(tensors)] + 1e30})
    load(path, view_of(model))
    with pytest.raises(InvalidAdapter, match=r"leave the range of the base's torch\.float16"):
        load(path, view_of(model, torch.float16))


@pytest.mark.parametrize("kind", ["vera", "loha", "lokr"])
def test_a_small_file_that_needs_much(tmp_path: Path, model: PreTrainedModel, kind: str, saved: Saved) -> None:
    path = write_adapter(tmp_path, *saved[kind])
    needed = load(path, view_of(model)).nbytes
    source = any_directory(str(path))
    room = max(needed, (path / "adapter_model.safetensors").stat().st_size)
    assert load_adapter(source, view_of(model), max_bytes=room).nbytes == needed
    # more bytes an element, and the file is the same
    message = rf"low-rank form takes {2 * needed} bytes .*; at most {room} are allowed \(max_adapter_bytes\)"
    with pytest.raises(OverCapacity, match=message):
        load_adapter(source, replace(view_of(model), dtype=torch.float64), max_bytes=room)
