"""adapter_config.json, read strictly: each key is supported, harmless, or refused by name.

The keys are those of PEFT 0.21's ``LoraConfig`` (peft/tuners/lora/config.py); a test walks that class, so that a key
new to PEFT cannot slip by. PEFT itself is not imported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from loraplex.adapters.strict_json import parse_object
from loraplex.errors import InvalidAdapter, UnsupportedFeature

T = TypeVar("T")

MAX_CONFIG_BYTES: Final = 1 << 20
MAX_RANK: Final = 4096
MAX_PATTERNS: Final = 4096

#: PEFT 0.21's PeftType: known by name, so that "not served" and "no such thing" are told apart
PEFT_TYPES: Final = frozenset(
    [
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "LORA",
        "ADALORA",
        "ADAMSS",
        "BOFT",
        "ADAPTION_PROMPT",
        "IA3",
        "BEFT",
        "LILY",
        "LOHA",
        "LOKR",
        "OFT",
        "POLY",
        "LN_TUNING",
        "VERA",
        "FROD",
        "PVERA",
        "FOURIERFT",
        "GLORA",
        "XLORA",
        "HRA",
        "VBLORA",
        "UNILORA",
        "CPT",
        "MISS",
        "RANDLORA",
        "ROAD",
        "TRAINABLE_TOKENS",
        "HIRA",
        "SHIRA",
        "C3A",
        "WAVEFT",
        "OSF",
        "DELORA",
        "GRALORA",
        "CARTRIDGE",
        "TINYLORA",
        "PSOFT",
        "PEANUT",
        "SHADOW",
        "SUPERTUNING",
        "DEFT",
        "BONE",
    ]
)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A config file as JSON, before any kind has read it. ``where`` names the file in messages."""

    peft_type: str
    values: Mapping[str, object]
    where: str

    def flag(self, key: str) -> bool:
        """Whether a boolean key is present and true; for a kind's ``matches``."""
        return self.values.get(key) is True


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What LoRA and rsLoRA read of a config; ``target_modules`` is a tuple of names or one pattern."""

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    where: str


def parse_config(raw: bytes, where: str) -> AdapterConfig:
    """The JSON object of an adapter_config.json and its peft_type.

    Raises:
        InvalidAdapter: not a JSON object, or no peft_type that PEFT knows.
    """
    values = parse_object(raw, where)
    peft_type = values.get("peft_type")
    if type(peft_type) is not str or peft_type not in PEFT_TYPES:
        raise InvalidAdapter(
            f"{where}: peft_type is {_shown(peft_type)}; expected a name that PEFT knows, such as LORA"
        )
    return AdapterConfig(peft_type, values, where)


def parse_lora(config: AdapterConfig) -> LoraConfig:
    """The config as LoRA reads it.

    Raises:
        InvalidAdapter: an unknown key, or a value of the wrong type or range; names the key.
        UnsupportedFeature: a PEFT feature that is not served; names the key and value.
    """
    for key, value in config.values.items():
        _check_key(key, value, config.where)
    found = _Reader(config)
    parsed = LoraConfig(
        r=found.rank("r", config.values.get("r", 8)),
        lora_alpha=found.alpha("lora_alpha", config.values.get("lora_alpha", 8)),
        use_rslora=config.flag("use_rslora"),
        target_modules=found.names_or_pattern("target_modules"),
        exclude_modules=found.names_or_pattern("exclude_modules"),
        layers_to_transform=found.layers(),
        layers_pattern=found.layer_names(),
        rank_pattern=found.patterns("rank_pattern", found.rank),
        alpha_pattern=found.patterns("alpha_pattern", found.alpha),
        where=config.where,
    )
    _check_together(parsed)
    return parsed


# ---- the rule of each key ----


def _is_bool(value: object) -> bool:
    return type(value) is bool


def _is_text(value: object) -> bool:
    return value is None or type(value) is str


def _is_init(value: object) -> bool:
    return _is_bool(value) or type(value) is str


def _is_object(value: object) -> bool:
    return value is None or type(value) is dict


def _is_list(value: object) -> bool:
    return value is None or type(value) is list


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_list_or_object(value: object) -> bool:
    return _is_list(value) or _is_object(value)


def _anything(value: object) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Refused:
    """A key that changes what is computed: refused by name unless its value is one of ``neutral``."""

    valid: Callable[[object], bool]
    neutral: tuple[object, ...]
    hint: str = ""


_CHANGED_BASE: Final = (
    "it assumes a changed base model; convert it where it was trained: "
    "save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL_ADAPTER)"
)
#: initialisations that leave the base as it is, so that nothing is left of them in what is served
_PLAIN_INITS: Final = (True, False, "gaussian", "eva", "orthogonal", "mica")
_NO_LIST: Final[tuple[object, ...]] = (None, [])

#: read by ``parse_lora``, which checks what the test here leaves open
SUPPORTED: Final[Mapping[str, Callable[[object], bool]]] = {
    "r": _anything,
    "lora_alpha": _anything,
    "use_rslora": _is_bool,
    "target_modules": _anything,
    "exclude_modules": _anything,
    "layers_to_transform": _anything,
    "layers_pattern": _anything,
    "rank_pattern": _is_object,
    "alpha_pattern": _is_object,
    "peft_type": _anything,
}
#: informational, or read in training alone: any value of the right type changes nothing that is served
HARMLESS: Final[Mapping[str, Callable[[object], bool]]] = {
    "auto_mapping": _is_object,
    "peft_version": _is_text,
    "base_model_name_or_path": _is_text,
    "revision": _is_text,
    "inference_mode": _is_bool,
    "lora_dropout": _is_number,
    "runtime_config": _is_object,
    # read only where another key, refused below, asks for it
    "megatron_core": _is_text,
    "loftq_config": _is_object,
    "eva_config": _is_object,
    "corda_config": _is_object,
    "lora_ga_config": _is_object,
    "qalora_group_size": _is_number,
}
REFUSED: Final[Mapping[str, Refused]] = {
    "task_type": Refused(_is_text, (None, "CAUSAL_LM"), "only causal language models are served"),
    "init_lora_weights": Refused(_is_init, _PLAIN_INITS, _CHANGED_BASE),
    "bias": Refused(_is_text, ("none",)),
    "fan_in_fan_out": Refused(_is_bool, (False,)),
    "use_dora": Refused(_is_bool, (False,)),
    "use_qalora": Refused(_is_bool, (False,)),
    "lora_bias": Refused(_is_bool, (False,)),
    "ensure_weight_tying": Refused(_is_bool, (False,)),
    "modules_to_save": Refused(_is_list, _NO_LIST),
    "trainable_token_indices": Refused(_is_list_or_object, (None,)),
    "alora_invocation_tokens": Refused(_is_list, _NO_LIST),
    "layer_replication": Refused(_is_list, _NO_LIST),
    "target_parameters": Refused(_is_list, _NO_LIST),
    "megatron_config": Refused(_is_object, (None,)),
    "velora_config": Refused(_is_object, (None,)),
    "monteclora_config": Refused(_is_object, (None,)),
    "use_bdlora": Refused(_is_object, (None,)),
    "arrow_config": Refused(_is_object, (None,)),
    "kasa_config": Refused(_is_object, (None,)),
}


def _check_key(key: str, value: object, where: str) -> None:
    refused = REFUSED.get(key)
    valid = refused.valid if refused is not None else SUPPORTED.get(key) or HARMLESS.get(key)
    if valid is None:
        raise InvalidAdapter(f"{where}: unknown key {key[:100]!r}; PEFT 0.21's LoraConfig has no such key")
    if not valid(value):
        raise InvalidAdapter(f"{where}: {key} is {_shown(value)}, which is not of its type")
    if refused is not None and value not in refused.neutral:
        allowed = ", ".join(_shown(neutral) for neutral in refused.neutral)
        hint = f"; {refused.hint}" if refused.hint else ""
        raise UnsupportedFeature(f"{where}: {key}={_shown(value)} is not served (only {allowed}){hint}", field=key)


@dataclass(frozen=True, slots=True)
class _Reader:
    config: AdapterConfig

    def _wrong(self, key: str, value: object, expected: str) -> InvalidAdapter:
        return InvalidAdapter(f"{self.config.where}: {key} is {_shown(value)}; expected {expected}")

    def rank(self, key: str, value: object) -> int:
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise self._wrong(key, value, f"an integer from 1 to {MAX_RANK}")
        return value

    def alpha(self, key: str, value: object) -> float:
        if type(value) is int and 0 < value < 1 << 53:
            return float(value)
        if type(value) is float and math.isfinite(value) and value > 0:
            return value
        raise self._wrong(key, value, "a finite number above 0 (0 would change nothing)")

    def patterns(self, key: str, read: Callable[[str, object], T]) -> dict[str, T]:
        value = self.config.values.get(key)
        if value is None:
            return {}
        if type(value) is not dict or len(value) > MAX_PATTERNS:
            raise self._wrong(key, value, f"at most {MAX_PATTERNS} module patterns with their values")
        return {pattern: read(f"{key}[{pattern[:100]!r}]", entry) for pattern, entry in value.items()}

    def names_or_pattern(self, key: str) -> tuple[str, ...] | str:
        value = self.config.values.get(key)
        return value if type(value) is str else self._strings(key, value)

    def layers(self) -> tuple[int, ...]:
        value = self.config.values.get("layers_to_transform")
        if value is None:
            return ()
        layers = value if type(value) is list else [value]
        if not all(type(layer) is int and layer >= 0 for layer in layers):
            raise self._wrong("layers_to_transform", value, "a layer number or a list of them")
        return tuple(layers)

    def layer_names(self) -> tuple[str, ...]:
        value = self.config.values.get("layers_pattern")
        names = ((value,) if value else ()) if type(value) is str else self._strings("layers_pattern", value)
        for name in names:
            if not all(part.isidentifier() for part in name.split(".")):
                raise UnsupportedFeature(
                    f"{self.config.where}: layers_pattern {name[:100]!r} is not a plain module name",
                    field="layers_pattern",
                )
        return names

    def _strings(self, key: str, value: object) -> tuple[str, ...]:
        if value is None:
            return ()
        if type(value) is not list or len(value) > MAX_PATTERNS or not all(type(v) is str and v for v in value):
            raise self._wrong(key, value, f"null, a string, or a list of at most {MAX_PATTERNS} module names")
        return tuple(value)


def _check_together(parsed: LoraConfig) -> None:
    """The combinations that PEFT's ``LoraConfig.__post_init__`` refuses."""
    if not parsed.target_modules:
        raise InvalidAdapter(f"{parsed.where}: target_modules is missing or empty; name the adapted modules")
    by_pattern = type(parsed.target_modules) is str
    for key, value in (("layers_to_transform", parsed.layers_to_transform), ("layers_pattern", parsed.layers_pattern)):
        if by_pattern and value:
            raise InvalidAdapter(f"{parsed.where}: {key} cannot be used when target_modules is a string")
    if parsed.layers_pattern and not parsed.layers_to_transform:
        raise InvalidAdapter(f"{parsed.where}: layers_pattern needs layers_to_transform")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
