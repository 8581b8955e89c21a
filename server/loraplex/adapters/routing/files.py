"""A router's directory: router.json, which is strict JSON, and router.safetensors, read as those of adapters are.

::

    {
      "loraplex_router": 1,
      "feature": "centroid",
      "base": {"hidden_size": 576, "vocab_size": 49152, "vocabulary": "9f86d0..."},
      "adapters": ["json", "sql"],
      "temperature": 0.01,
      "threshold": 0.5,
      "default": null
    }

with a tensor ``prototypes.I`` of ``[K, hidden_size]`` for the adapter at place I of the list.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import torch
from safetensors.torch import save_file

from loraplex.adapters.reading.phrases import shown, some
from loraplex.adapters.reading.safetensors_file import read_tensors
from loraplex.adapters.reading.source import CONFIG_FILE, AdapterDir, read_small_file
from loraplex.adapters.reading.strict_json import parse_object
from loraplex.errors import AlreadyExists, InvalidAdapter, InvalidRequest, NotPermitted
from loraplex.types import NAME_PATTERN, ROUTER_PREFIX, RouterInfo

ROUTER_FILE: Final = "router.json"
PROTOTYPE_FILE: Final = "router.safetensors"
KIND: Final = "router"
CENTROID: Final = "centroid"
ARROW: Final = "arrow"
FEATURES: Final = (CENTROID, ARROW)
MAX_ADAPTERS: Final = 256
MAX_PROTOTYPES: Final = 64
#: scores lie in [-1, 1]: below this, differences that float32 cannot tell would decide
MIN_TEMPERATURE: Final = 1e-5
MAX_TEMPERATURE: Final = 1e3

_VERSION: Final = 1
_VERSION_KEY: Final = "loraplex_router"
_MAX_CONFIG_BYTES: Final = 1 << 20
_KEYS: Final = (_VERSION_KEY, "feature", "base", "adapters", "temperature", "threshold", "default")
_BASE_KEYS: Final = ("hidden_size", "vocab_size", "vocabulary")
_NAME: Final = re.compile(NAME_PATTERN)
_DIGEST: Final = re.compile(r"(?:[0-9a-f]{64})?")


@dataclass(frozen=True, slots=True)
class RouterBase:
    """The base model that prototypes were made on. ``vocabulary``: digest of its tokenizer's tokens and ids
    (``vocabulary_digest``); empty: it had no tokenizer."""

    hidden_size: int
    vocab_size: int
    vocabulary: str


@dataclass(frozen=True, slots=True)
class RouterFile:
    """A router as its directory holds it. ``prototypes``: of each adapter of ``info``, ``[K, hidden_size]``."""

    info: RouterInfo
    base: RouterBase
    prototypes: tuple[torch.Tensor, ...]


def is_router(directory: AdapterDir) -> bool:
    """Whether a source is a router's directory. Raises InvalidAdapter: it is an adapter's, too."""
    if not directory.has(ROUTER_FILE):
        return False
    if directory.has(CONFIG_FILE):
        raise InvalidAdapter(
            f"{directory.shown} holds both {ROUTER_FILE} and {CONFIG_FILE}: it is either a router or an adapter"
        )
    return True


def read_router(directory: AdapterDir, *, max_bytes: int) -> tuple[RouterFile, str]:
    """The router in ``directory``, and its uid: the digest of its canonical JSON and its tensors' bytes.

    Raises:
        InvalidAdapter: a file is missing or malformed, or the two do not fit each other; names file and key.
        OverCapacity: the tensors take more than ``max_bytes``.
    """
    where = directory.where(ROUTER_FILE)
    values = parse_object(read_small_file(directory, ROUTER_FILE, _MAX_CONFIG_BYTES), where)
    fields = _Fields(values, where)
    fields.expect(_KEYS)
    if values[_VERSION_KEY] != _VERSION:
        fields.refuse(_VERSION_KEY, f"the version that this server reads: {_VERSION}")
    feature = fields.one_of("feature", FEATURES)
    names = fields.names("adapters")
    base = _base(fields)
    temperature = fields.number("temperature", MIN_TEMPERATURE, MAX_TEMPERATURE)
    threshold = fields.number("threshold", 0.0, 1.0)
    default = fields.default()
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(len(canonical).to_bytes(8, "little") + canonical)
    with directory.open(PROTOTYPE_FILE) as fd:
        file = read_tensors(fd, directory.where(PROTOTYPE_FILE), max_bytes=max_bytes, digest=digest)
    prototypes = _prototypes(file.tensors, names, base.hidden_size, directory.where(PROTOTYPE_FILE))
    counts = tuple(len(each) for each in prototypes)
    info = RouterInfo(feature, names, counts, temperature, threshold, default)
    return RouterFile(info, base, prototypes), digest.hexdigest()


def write_router(path: Path, file: RouterFile) -> None:
    """Write ``path``, a directory that is not there yet: whole, or not at all.

    Raises AlreadyExists: something is there. NotPermitted: it cannot be written.
    """
    if path.exists():
        raise AlreadyExists(f"{path} exists; name a directory that is to be made")
    info = file.info
    values = {
        _VERSION_KEY: _VERSION,
        "feature": info.feature,
        "base": {key: getattr(file.base, key) for key in _BASE_KEYS},
        "adapters": list(info.adapters),
        "temperature": info.temperature,
        "threshold": info.threshold,
        "default": info.default or None,
    }
    part = path.with_name(f"{path.name}.partial")
    try:
        part.mkdir(parents=True)
        (part / ROUTER_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        tensors = {_key(index): each.float().clone().contiguous() for index, each in enumerate(file.prototypes)}
        save_file(tensors, part / PROTOTYPE_FILE)
        part.rename(path)
    except FileExistsError:
        raise AlreadyExists(f"{part} is left of a build that did not end, or one is under way; remove it") from None
    except OSError as error:
        raise NotPermitted(f"{path} cannot be written: {error.strerror}") from error


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names that a router may choose among. Raises InvalidRequest."""
    found = tuple(names)
    problem = _wrong_names(list(found))
    if problem:
        raise InvalidRequest(f"adapters: {problem}", field="adapters")
    return found


def _wrong_names(names: list[object]) -> str:
    """What is wrong with them; empty: nothing."""
    if not 0 < len(names) <= MAX_ADAPTERS:
        return f"{len(names)} names; a router chooses among 1 to {MAX_ADAPTERS}"
    seen: set[str] = set()
    for name in names:
        if type(name) is not str or not _NAME.fullmatch(name):
            return f"{shown(name)} is no adapter's name; expected {NAME_PATTERN}"
        if name.startswith(ROUTER_PREFIX):
            return f"{shown(name)} asks for a router; a router chooses among adapters alone"
        if name in seen:
            return f"{shown(name)} stands there twice"
        seen.add(name)
    return ""


def _base(fields: _Fields) -> RouterBase:
    section = fields.section("base")
    section.expect(_BASE_KEYS)
    return RouterBase(
        section.integer("hidden_size"), section.integer("vocab_size"), section.matching("vocabulary", _DIGEST)
    )


def _prototypes(
    tensors: Mapping[str, torch.Tensor], names: tuple[str, ...], hidden_size: int, where: str
) -> tuple[torch.Tensor, ...]:
    """One for each name, unit vectors in float32."""
    keys = [_key(index) for index in range(len(names))]
    missing = [f"{key} (of {name!r})" for key, name in zip(keys, names, strict=True) if key not in tensors]
    if missing:
        raise InvalidAdapter(f"{where} lacks {some(missing)}: {ROUTER_FILE} names {len(names)} adapters")
    strange = sorted(tensors.keys() - set(keys))
    if strange:
        raise InvalidAdapter(f"{where}: tensors {some(strange)} belong to none of the {len(names)} adapters")
    return tuple(
        _unit(tensors[key], name, hidden_size, f"{where}: {key}") for key, name in zip(keys, names, strict=True)
    )


def _unit(tensor: torch.Tensor, name: str, hidden_size: int, where: str) -> torch.Tensor:
    if tensor.dim() != 2 or not 0 < len(tensor) <= MAX_PROTOTYPES or tensor.shape[1] != hidden_size:
        raise InvalidAdapter(
            f"{where} of adapter {name!r} has shape {list(tensor.shape)}, expected [1 to {MAX_PROTOTYPES}, "
            f"{hidden_size}]"
        )
    norms: torch.Tensor = torch.linalg.vector_norm(tensor.double(), dim=1, keepdim=True)
    if not (norms > 0).all():
        raise InvalidAdapter(f"{where} of adapter {name!r} holds a vector of zeros, which has no direction")
    unit: torch.Tensor = (tensor.double() / norms).float()
    return unit


def _key(index: int) -> str:
    return f"prototypes.{index}"


class _Fields:
    """Typed reads of one object of router.json."""

    def __init__(self, values: Mapping[str, object], where: str, prefix: str = "") -> None:
        self._values = values
        self._where = where
        self._prefix = prefix

    def expect(self, keys: tuple[str, ...]) -> None:
        """All of these, and no others."""
        missing, strange = [key for key in keys if key not in self._values], sorted(self._values.keys() - set(keys))
        if missing or strange:
            what = f"lacks {some(missing)}" if missing else f"has unknown keys {some(strange)}"
            raise InvalidAdapter(f"{self._where}: {self._prefix or 'it '}{what}; expected are {', '.join(keys)}")

    def refuse(self, key: str, allowed: str) -> NoReturn:
        raise InvalidAdapter(
            f"{self._where}: {self._prefix}{key} is {shown(self._values[key])}, expected {allowed}", field=key
        )

    def section(self, key: str) -> _Fields:
        value = self._values[key]
        if not isinstance(value, dict):
            self.refuse(key, "an object")
        return _Fields(value, self._where, f"{self._prefix}{key}.")

    def integer(self, key: str) -> int:
        value = self._values[key]
        if type(value) is not int or value < 1:
            self.refuse(key, "an integer of at least 1")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        value = self._values[key]
        if type(value) not in (int, float) or not isinstance(value, int | float) or not low <= value <= high:
            self.refuse(key, f"a number from {low:g} to {high:g}")
        assert math.isfinite(value)
        return float(value)

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self._values[key]
        if not isinstance(value, str) or value not in allowed:
            self.refuse(key, f"one of {', '.join(allowed)}")
        return value

    def matching(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self._values[key]
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self.refuse(key, "a SHA-256 in hex, or empty")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self._values[key]
        problem = _wrong_names(value) if isinstance(value, list) else "expected a list of names"
        if problem:
            raise InvalidAdapter(f"{self._where}: {self._prefix}{key}: {problem}", field=key)
        assert isinstance(value, list)
        return tuple(value)

    def default(self) -> str:
        value = self._values["default"]
        if value is None:
            return ""
        problem = _wrong_names([value])
        if problem:
            raise InvalidAdapter(f"{self._where}: default: {problem}; null is the base", field="default")
        return str(value)
