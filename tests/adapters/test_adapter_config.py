"""adapter_config.json: every key of PEFT's LoraConfig has its place, and every refusal names its key."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from loraplex.adapters.kinds import KINDS
from loraplex.adapters.kinds.base import AdapterKind
from loraplex.adapters.kinds.refusals import REASONS
from loraplex.adapters.kinds.registry import KindRegistry
from loraplex.adapters.lora_family.keys import LORA_KEYS
from loraplex.adapters.reading.config_file import PEFT_TYPES, AdapterConfig, parse_config
from loraplex.adapters.reading.keys import ConfigReader, Role, check_keys
from loraplex.errors import InvalidAdapter, UnsupportedFeature

WHERE = "fr/adapter_config.json"


def parsed(**values: Any) -> AdapterConfig:
    """A config that its kind's rules and readers have been through."""
    config = parse_config(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], **values}).encode(), WHERE)
    check_keys(config, LORA_KEYS, "lora")
    found = ConfigReader(config)
    found.target_rule()
    found.rank("r", 8)
    found.rank_pattern()
    found.alpha("lora_alpha", 8)
    found.alpha_pattern()
    return config


def keys_of(role: Role) -> list[str]:
    return sorted(key for key, rule in LORA_KEYS.items() if rule.role is role)


def test_every_key_of_peft_has_a_rule() -> None:
    assert set(LORA_KEYS) == {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_every_peft_type_is_known() -> None:
    assert {member.value for member in peft.PeftType} <= PEFT_TYPES


def test_what_peft_writes_by_default_is_accepted() -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=8, lora_alpha=16, task_type="CAUSAL_LM")
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    parsed(**values)


def test_absent_keys_take_peft_defaults() -> None:
    found = ConfigReader(parse_config(b'{"peft_type": "LORA", "target_modules": "all-linear"}', WHERE))
    default = peft.LoraConfig()
    assert (found.rank("r", 8), found.alpha("lora_alpha", 8)) == (default.r, default.lora_alpha)


NON_NEUTRAL = {
    "task_type": "SEQ_CLS",
    "init_lora_weights": "pissa",
    "use_qalora": True,
    "layer_replication": [[0, 2]],
    "target_parameters": ["w"],
    "megatron_config": {"a": 1},
    "velora_config": {},
    "monteclora_config": {},
    "arrow_config": {"top_k": 2},
    "kasa_config": {},
}


@pytest.mark.parametrize("key", keys_of(Role.REFUSED))
def test_each_refused_key_is_refused_by_name(key: str) -> None:
    value = NON_NEUTRAL[key]
    with pytest.raises(UnsupportedFeature) as caught:
        parsed(**{key: value})
    assert f"{WHERE}: {key}={value!r}" in str(caught.value)
    assert caught.value.field == key
    for neutral in LORA_KEYS[key].neutral:
        parsed(**{key: neutral})


@pytest.mark.parametrize("key", keys_of(Role.REFUSED))
def test_neutral_values_are_not_taken_from_another_type(key: str) -> None:
    with pytest.raises(InvalidAdapter, match=rf"{key} is "):
        parsed(**{key: 0})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "PiSSA"])
def test_inits_that_change_the_base_are_refused_with_a_hint(init: str) -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        parsed(init_lora_weights=init)
    assert "changed base" in str(caught.value)
    assert "path_initial_model_for_weight_conversion" in str(caught.value)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_leave_the_base_are_harmless(init: object) -> None:
    parsed(init_lora_weights=init)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"r": 0}, "r is 0; expected an integer from 1 to 4096"),
        ({"r": 5000}, "r is 5000"),
        ({"r": True}, "r is True"),
        ({"r": 8.0}, "r is 8.0"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": 0}, "lora_alpha is 0; expected a finite number above 0"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"use_rslora": "true"}, "use_rslora is 'true'"),
        ({"inference_mode": 1}, "inference_mode is 1"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0"),
        ({"rank_pattern": {"q_proj": True}}, "rank_pattern['q_proj'] is True"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj']"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern['q_proj'] is 0"),
        ({"alpha_pattern": {"q_proj": "1"}}, "alpha_pattern['q_proj'] is '1'"),
        ({"target_modules": []}, "target_modules is missing or empty"),
        ({"target_modules": None}, "target_modules is missing or empty"),
        ({"target_modules": ["q_proj", 1]}, "target_modules is ['q_proj', 1]"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is {'q_proj': 1}"),
        ({"exclude_modules": 3}, "exclude_modules is 3"),
        ({"layers_to_transform": [True]}, "layers_to_transform is [True]"),
        ({"layers_to_transform": -1}, "layers_to_transform is -1"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, "layers_to_transform cannot be used"),
    ],
)
def test_wrong_values_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        parsed(**values)
    assert str(caught.value).startswith(f"{WHERE}: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


def test_layers_pattern_must_be_plain() -> None:
    with pytest.raises(UnsupportedFeature, match=r"layers_pattern 'h\.\*'"):
        parsed(layers_to_transform=[0], layers_pattern="h.*")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"not json", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b"{}", "peft_type is None"),
        (b'{"peft_type": "NO_SUCH"}', "peft_type is 'NO_SUCH'"),
        (b'{"peft_type": ["LORA"]}', "peft_type is ['LORA']"),
        (b'{"peft_type": "LORA", "peft_type": "IA3"}', "'peft_type' appears twice"),
        (b'{"peft_type": "LORA", "lora_alpha": Infinity}', "Infinity is not JSON"),
    ],
)
def test_malformed_files_are_named(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        parse_config(raw, WHERE)
    assert str(caught.value).startswith(WHERE)
    assert message in str(caught.value)


def kinds_of(peft_type: str) -> list[AdapterKind]:
    config = AdapterConfig(peft_type, {"peft_type": peft_type}, WHERE)
    return [kind for kind in KINDS if kind.matches(config)]


@pytest.mark.parametrize("peft_type", sorted(t for t in PEFT_TYPES if not kinds_of(t)))
def test_other_peft_types_are_refused_by_name(peft_type: str) -> None:
    config = parse_config(json.dumps({"peft_type": peft_type}).encode(), WHERE)
    with pytest.raises(UnsupportedFeature) as caught:
        KindRegistry().of(config)
    served = ", ".join(kind.name for kind in KINDS)
    assert (
        str(caught.value) == f"{WHERE}: peft_type={peft_type} is not served: {REASONS[peft_type]} (served are {served})"
    )
    assert caught.value.field == "peft_type"


def test_a_reason_is_given_for_each_type_that_is_not_served_and_no_other() -> None:
    assert {t for t in PEFT_TYPES if not kinds_of(t)} == set(REASONS)


@pytest.mark.parametrize("peft_type", sorted(t for t in PEFT_TYPES if kinds_of(t)))
def test_every_key_of_a_served_type_has_a_rule(peft_type: str) -> None:
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)])}
    assert [kind.name for kind in kinds_of(peft_type) if set(kind.keys) != known] == []


def test_lora_is_served() -> None:
    assert [kind.name for kind in kinds_of("LORA")] == ["lora"]


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"use_dora": False, "use_bdlora": None, "alora_invocation_tokens": []},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "use_rslora": True},
    "bdlora": {"use_bdlora": {}, "use_rslora": True},
    "alora": {"alora_invocation_tokens": [1]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_one_kind_matches_each_lora_config(name: str) -> None:
    config = parse_config(json.dumps({"peft_type": "LORA", **VARIANTS[name]}).encode(), WHERE)
    assert [kind.name for kind in KINDS if kind.matches(config)] == [name]
    assert KindRegistry().of(config).keys is LORA_KEYS


def test_every_variant_of_peft_is_a_kind_or_refused() -> None:
    """PEFT marks the keys that choose another form than LoRA's; none may pass as plain LoRA."""
    values = {"use_dora": True, "use_bdlora": {}, "alora_invocation_tokens": [1]}
    marked = {field.name for field in dataclasses.fields(peft.LoraConfig) if field.metadata.get("is_lora_variant")}
    assert marked == values.keys() | {"velora_config", "monteclora_config", "arrow_config", "kasa_config"}
    for key in marked:
        config = AdapterConfig("LORA", {key: values.get(key)}, WHERE)
        assert (KindRegistry().of(config).name != "lora") is (LORA_KEYS[key].role is Role.SERVED)


@pytest.mark.parametrize(
    "values",
    [{"use_rslora": 1}, {"use_dora": "yes"}, {"lora_bias": 1}, {"use_bdlora": []}, {"alora_invocation_tokens": 3}],
    ids=str,
)
def test_odd_values_choose_no_kind(values: dict[str, Any]) -> None:
    odd = parse_config(json.dumps({"peft_type": "LORA", "target_modules": ["q"], **values}).encode(), WHERE)
    with pytest.raises(InvalidAdapter, match=rf"{next(iter(values))} is "):
        check_keys(odd, KindRegistry().of(odd).keys, "lora")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"r": "four"}, "r"),
        ({"inference_mode": 1}, "inference_mode"),
        ({"blorp": 1}, "blorp"),
        ({"bl\u00f6rp": 1}, "bl\u00f6rp"),
        ({"peft_type": "LORRA"}, "peft_type"),
        ({"target_modules": []}, "target_modules"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": 3}, "alpha_pattern"),
        ({"target_modules": "q.*", "layers_to_transform": [1]}, "layers_to_transform"),
        ({"layers_pattern": ["h"]}, "layers_pattern"),
    ],
)
def test_an_error_names_the_key_for_machines_too(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        parsed(**values)
    assert caught.value.field == field
