"""The rule of each key of adapter_config.json: served, harmless, or refused by name unless it is neutral.

Fail-closed: a kind lists every key that its PEFT config class has, and a key in no list is an error. Tests walk PEFT's
classes, so that a key new to PEFT cannot slip by. PEFT itself is not imported here.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeVar

from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.phrases import shown
from loraplex.adapters.reading.targets import TargetRule
from loraplex.errors import InvalidAdapter, UnsupportedFeature

T = TypeVar("T")

MAX_RANK: Final = 4096
MAX_PATTERNS: Final = 4096
MAX_TOKENS: Final = 65536


class Role(enum.Enum):
    """What becomes of a key."""

    SERVED = "served"  # read by the kind, or by a part that all kinds share
    HARMLESS = "harmless"  # informational, or read in training alone: any value of its type
    REFUSED = "refused"  # changes what is computed, and is not served: only neutral values are taken


@dataclass(frozen=True, slots=True)
class KeyRule:
    """One key's rule. ``valid`` tells its type; ``neutral`` and ``hint`` are of REFUSED keys."""

    role: Role
    valid: Callable[[object], bool]
    neutral: tuple[object, ...] = ()
    hint: str = ""


KeyRules = Mapping[str, KeyRule]


def is_bool(value: object) -> bool:
    return type(value) is bool


def is_text(value: object) -> bool:
    return value is None or type(value) is str


def is_object(value: object) -> bool:
    return value is None or type(value) is dict


def is_list(value: object) -> bool:
    return value is None or type(value) is list


def is_number(value: object) -> bool:
    return type(value) in (int, float)


def is_bool_or_text(value: object) -> bool:
    return is_bool(value) or type(value) is str


def is_list_or_object(value: object) -> bool:
    return is_list(value) or is_object(value)


def anything(value: object) -> bool:
    return True


def served(valid: Callable[[object], bool] = anything) -> KeyRule:
    """A key that is read; its reader checks what ``valid`` leaves open."""
    return KeyRule(Role.SERVED, valid)


def harmless(valid: Callable[[object], bool]) -> KeyRule:
    """A key that changes nothing that is served."""
    return KeyRule(Role.HARMLESS, valid)


def refused(valid: Callable[[object], bool], *neutral: object, hint: str = "") -> KeyRule:
    """A key that is taken only with one of the ``neutral`` values."""
    return KeyRule(Role.REFUSED, valid, neutral, hint)


#: of every PEFT config (``PeftConfig``)
COMMON_KEYS: Final[KeyRules] = MappingProxyType(
    {
        "peft_type": served(),
        "task_type": refused(is_text, None, "CAUSAL_LM", hint="only causal language models are served"),
        "auto_mapping": harmless(is_object),
        "peft_version": harmless(is_text),
        "base_model_name_or_path": harmless(is_text),
        "revision": harmless(is_text),
        "inference_mode": harmless(is_bool),
    }
)


def check_keys(config: AdapterConfig, rules: KeyRules, kind: str) -> None:
    """Hold every key of ``config`` against its rule.

    Raises:
        InvalidAdapter: a key without a rule, or a value of another type; names the key.
        UnsupportedFeature: a refused key that is not neutral; names key and value.
    """
    for key, value in config.values.items():
        rule = rules.get(key)
        if rule is None:
            raise InvalidAdapter(
                f"{config.where}: unknown key {key[:100]!r}; a config of kind {kind} has no such key",
                field=key[:100],
            )
        if not rule.valid(value):
            raise InvalidAdapter(f"{config.where}: {key} is {shown(value)}, which is not of its type", field=key)
        if rule.role is Role.REFUSED and value not in rule.neutral:
            allowed = ", ".join(shown(neutral) for neutral in rule.neutral)
            hint = f"; {rule.hint}" if rule.hint else ""
            raise UnsupportedFeature(
                f"{config.where}: {key}={shown(value)} is not served (only {allowed}){hint}", field=key
            )


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """Typed values of a config, for kinds. All raise InvalidAdapter naming key, value and what is allowed."""

    config: AdapterConfig

    def wrong(self, key: str, value: object, expected: str) -> InvalidAdapter:
        """The error for a value that is not what it should be."""
        whole = key.partition("[")[0]  # without the pattern, where it is an entry of some
        return InvalidAdapter(f"{self.config.where}: {key} is {shown(value)}; expected {expected}", field=whole)

    def rank(self, key: str, default: int) -> int:
        return self._rank(key, self.config.values.get(key, default))

    def alpha(self, key: str, default: float) -> float:
        return self._alpha(key, self.config.values.get(key, default))

    def integer(self, key: str, default: int, *, minimum: int = 0) -> int:
        value = self.config.values.get(key, default)
        if type(value) is not int or value < minimum:
            raise self.wrong(key, value, f"an integer of at least {minimum}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.config.values.get(key, default)
        if type(value) is int and abs(value) < 1 << 53:
            return float(value)
        if type(value) is float and math.isfinite(value):
            return value
        raise self.wrong(key, value, "a finite number")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.config.values.get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def rank_pattern(self, key: str = "rank_pattern") -> dict[str, int]:
        return self._patterns(key, self._rank)

    def alpha_pattern(self, key: str = "alpha_pattern") -> dict[str, float]:
        return self._patterns(key, self._alpha)

    def names(self, key: str) -> tuple[str, ...]:
        """Module names: a list, or null."""
        value = self.config.values.get(key)
        if value is None:
            return ()
        if type(value) is not list or len(value) > MAX_PATTERNS or not all(type(v) is str and v for v in value):
            raise self.wrong(key, value, f"null, a string, or a list of at most {MAX_PATTERNS} module names")
        return tuple(value)

    def names_or_pattern(self, key: str) -> tuple[str, ...] | str:
        """Module names, or one pattern."""
        value = self.config.values.get(key)
        return value if type(value) is str else self.names(key)

    def token_ids(self, key: str, value: object) -> tuple[int, ...]:
        """``value`` as token ids, in its order; their upper bound, and whether one may come twice, is the reader's."""
        if type(value) is not list or not value or len(value) > MAX_TOKENS:
            raise self.wrong(key, value, f"a list of 1 to {MAX_TOKENS} token ids")
        if not all(type(token) is int and token >= 0 for token in value):
            raise self.wrong(key, value, "a list of token ids, each an integer of at least 0")
        return tuple(value)

    def target_rule(self) -> TargetRule:
        """``target_modules`` and the keys that narrow it. Raises also for combinations that PEFT refuses."""
        rule = TargetRule(
            target_modules=self.names_or_pattern("target_modules"),
            exclude_modules=self.names_or_pattern("exclude_modules"),
            layers_to_transform=self._layers(),
            layers_pattern=self._layer_names(),
            where=self.config.where,
            modules_to_save=self.names("modules_to_save"),
        )
        rule.check()
        return rule

    def _rank(self, key: str, value: object) -> int:
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise self.wrong(key, value, f"an integer from 1 to {MAX_RANK}")
        return value

    def _alpha(self, key: str, value: object) -> float:
        if type(value) is int and 0 < value < 1 << 53:
            return float(value)
        if type(value) is float and math.isfinite(value) and value > 0:
            return value
        raise self.wrong(key, value, "a finite number above 0 (0 would change nothing)")

    def _patterns(self, key: str, read: Callable[[str, object], T]) -> dict[str, T]:
        value = self.config.values.get(key)
        if value is None:
            return {}
        if type(value) is not dict or len(value) > MAX_PATTERNS:
            raise self.wrong(key, value, f"at most {MAX_PATTERNS} module patterns with their values")
        return {pattern: read(f"{key}[{pattern[:100]!r}]", entry) for pattern, entry in value.items()}

    def _layers(self) -> tuple[int, ...]:
        value = self.config.values.get("layers_to_transform")
        if value is None:
            return ()
        layers = value if type(value) is list else [value]
        if len(layers) > MAX_PATTERNS or not all(type(layer) is int and layer >= 0 for layer in layers):
            raise self.wrong("layers_to_transform", value, f"a layer number or a list of at most {MAX_PATTERNS}")
        return tuple(layers)

    def _layer_names(self) -> tuple[str, ...]:
        value = self.config.values.get("layers_pattern")
        names = ((value,) if value else ()) if type(value) is str else self.names("layers_pattern")
        for name in names:
            if not all(part.isidentifier() for part in name.split(".")):
                raise UnsupportedFeature(
                    f"{self.config.where}: layers_pattern {name[:100]!r} is not a plain module name",
                    field="layers_pattern",
                )
        return names
