"""adapter_config.json as a file: JSON, and a peft_type that PEFT knows. What its keys mean is the kinds' business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loraplex.adapters.reading.phrases import shown
from loraplex.adapters.reading.source import CONFIG_FILE, AdapterDir, read_small_file
from loraplex.adapters.reading.strict_json import parse_object
from loraplex.errors import InvalidAdapter

MAX_CONFIG_BYTES: Final = 1 << 20

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

    def has(self, key: str) -> bool:
        """Whether a key is there and says something: not null, not false, not empty; for a kind's ``matches``."""
        return bool(self.values.get(key))


def read_config(directory: AdapterDir, also_known: frozenset[str]) -> AdapterConfig:
    """A directory's config. Raises as ``parse_config`` does, and as ``read_small_file``."""
    raw = read_small_file(directory, CONFIG_FILE, MAX_CONFIG_BYTES)
    return parse_config(raw, directory.where(CONFIG_FILE), also_known=also_known)


def parse_config(raw: bytes, where: str, *, also_known: frozenset[str] = frozenset()) -> AdapterConfig:
    """The JSON object of an adapter_config.json and its peft_type, which PEFT or ``also_known`` must name.

    Raises:
        InvalidAdapter: not a JSON object, or a peft_type that nobody knows.
    """
    values = parse_object(raw, where)
    peft_type = values.get("peft_type")
    if type(peft_type) is not str or peft_type not in PEFT_TYPES | also_known:
        raise InvalidAdapter(
            f"{where}: peft_type is {shown(peft_type)}; expected a name that PEFT knows, such as LORA",
            field="peft_type",
        )
    return AdapterConfig(peft_type, values, where)
