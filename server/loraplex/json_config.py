"""config.json, read strictly: a checked JSON object, and typed reads that name the key, the value and what is allowed.

Knows JSON and types; which keys a family needs is said in ``spec.py`` and the families' own files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn

from loraplex.errors import InvalidModel, NotFound

MAX_CONFIG_BYTES: Final = 1 << 20


def read_config(model_dir: Path) -> dict[str, object]:
    """The object in ``model_dir/config.json``.

    Raises NotFound when the directory is not there, InvalidModel when the file is missing, larger than 1 MiB, or not
    one strict JSON object (no duplicate keys, no NaN; Infinity is a number that few keys may be).
    """
    if not model_dir.is_dir():
        raise NotFound(f"model directory {str(model_dir)!r} does not exist", field="model")
    return read_json_object(model_dir / "config.json", MAX_CONFIG_BYTES)


def read_json_object(path: Path, max_bytes: int) -> dict[str, object]:
    """One strict JSON object of at most ``max_bytes``; raises InvalidModel naming the file."""
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise InvalidModel(f"{str(path)!r} cannot be read: {error.strerror}") from error
    if len(raw) > max_bytes:
        raise InvalidModel(f"{str(path)!r} is larger than {max_bytes} bytes")
    try:
        value = json.loads(raw, object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{str(path)!r} is not strict JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{str(path)!r} holds a {type(value).__name__}, expected an object")
    return value


class ConfigFields:
    """Typed reads of a JSON object. A key that is null counts as absent.

    ``where`` is put before keys in messages: "" for the file's top level, "rope_parameters." for a section.
    """

    def __init__(self, values: Mapping[str, object], where: str = "") -> None:
        self._values = values
        self._where = where

    def keys(self) -> tuple[str, ...]:
        """Everything that stands there."""
        return tuple(self._values)

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def declares(self, key: str) -> bool:
        """Whether the key stands there at all, be it null."""
        return key in self._values

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.refuse(key, f"an integer of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.refuse(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            self.refuse(key, "a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty when absent."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(key, "a list of strings")
        return tuple(value)

    def integers(self, key: str, *, minimum: int = 1) -> tuple[int, ...]:
        """A list of integers; empty when absent."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(type(item) is int and item >= minimum for item in value):
            self.refuse(key, f"a list of integers of at least {minimum}")
        return tuple(value)

    def numbers(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """As many finite numbers as the default has."""
        value = self._get(key, list(default))
        if not isinstance(value, list) or len(value) != len(default) or not all(map(_is_number, value)):
            self.refuse(key, f"a list of {len(default)} numbers")
        return tuple(map(float, value))

    def value(self, key: str) -> object:
        """What stands there, whatever it is; None when absent: for keys that may be of several types."""
        return self._values.get(key)

    def section(self, key: str) -> ConfigFields | None:
        """The object under ``key``; None when it is absent or empty."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            self.refuse(key, "an object")
        return ConfigFields(value, f"{self._where}{key}.") if value else None

    def sections(self) -> tuple[str, ...]:
        """Keys whose values are objects themselves."""
        return tuple(key for key, value in self._values.items() if isinstance(value, dict))

    def renamed(self, names: Mapping[str, str]) -> ConfigFields:
        """With these keys under other names, where nothing stands under those."""
        values = {key: value for key, value in self._values.items() if key not in names}
        old = {names[key]: value for key, value in self._values.items() if key in names}
        return ConfigFields(old | values, self._where)

    def refuse(self, key: str, allowed: str) -> NoReturn:
        """Raise InvalidModel for the value of ``key``."""
        raise InvalidModel(
            f"config.json: {self._where}{key} is {_shown(self._values.get(key))}, expected {allowed}", field=key
        )

    def _get(self, key: str, default: object) -> object:
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise InvalidModel(f"config.json: {self._where}{key} is missing", field=key)
            return default
        return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} stands twice")
        found[key] = value
    return found


def _constant(constant: str) -> float:
    """transformers 4 writes a limit that there is not as Infinity; numbers that must be finite say so when read."""
    if constant != "Infinity":
        raise ValueError(f"{constant} is not a JSON number")
    return math.inf


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value
