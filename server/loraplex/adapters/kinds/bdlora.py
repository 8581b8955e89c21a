"""BD-LoRA: LoRA whose A, or whose B, is block-diagonal, so that a layer cut over several processes
has its blocks where they are used.

Source: peft 0.21 tuners/lora/config.py ``BdLoraConfig`` and tuners/lora/variants.py ``BdLoraLinearVariant``. The blocks
are saved below each other; here they become the dense matrices that they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.kinds.base import Lowered
from loraplex.adapters.lora_family.keys import LORA_KEYS
from loraplex.adapters.lora_family.plan import lora_variant
from loraplex.adapters.lora_family.reading import read_lora
from loraplex.adapters.lora_family.tensors import Blocks
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import ConfigReader, KeyRules
from loraplex.errors import InvalidAdapter, UnsupportedFeature
from loraplex.models.sites import Site, SiteKind

_KEYS: Final = ("target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict")


@dataclass(frozen=True, slots=True)
class BdLoraKind:
    """BD-LoRA, with LoRA's or rsLoRA's scale."""

    name: str = "bdlora"

    @property
    def keys(self) -> KeyRules:
        return LORA_KEYS

    def matches(self, config: AdapterConfig) -> bool:
        return config.peft_type == "LORA" and lora_variant(config) == "use_bdlora"

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        """See ``AdapterKind.lower``."""
        rule = _BlockRule.of(files.config)
        reading = read_lora(files, base, rule.blocks)
        return Lowered(reading.completed({pair.site.name: pair.delta(base.dtype) for pair in reading.pairs}))


@dataclass(frozen=True, slots=True)
class _BlockRule:
    """``use_bdlora``: parts of names whose A (or B) has ``nblocks`` blocks; ``is_strict``: every site has either."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    nblocks: int
    is_strict: bool
    where: str

    @staticmethod
    def of(config: AdapterConfig) -> _BlockRule:
        """Raises InvalidAdapter naming the key."""
        values = config.values["use_bdlora"]
        where = f"{config.where}: use_bdlora"
        assert isinstance(values, Mapping)
        if unknown := [key for key in values if key not in _KEYS]:
            raise InvalidAdapter(f"{where}: unknown key {unknown[0][:100]!r}; it has {', '.join(_KEYS)}")
        found = ConfigReader(AdapterConfig(config.peft_type, values, where))
        rule = _BlockRule(
            a=found.names("target_modules_bd_a"),
            b=found.names("target_modules_bd_b"),
            nblocks=found.integer("nblocks", 1, minimum=1),
            is_strict=found.flag("match_strict", True),
            where=where,
        )
        if both := sorted({*rule.a} & {*rule.b}):
            raise InvalidAdapter(f"{where}: {both[0]!r} is in target_modules_bd_a and in target_modules_bd_b")
        return rule

    def blocks(self, site: Site) -> Blocks:
        """How the pair of a targeted site is saved."""
        if site.kind is not SiteKind.LINEAR:
            raise UnsupportedFeature(
                f"{self.where} is not served for {site.name!r}: PEFT has none for embeddings", field="use_bdlora"
            )
        in_a, in_b = (any(part in site.name for part in parts) for parts in (self.a, self.b))
        if in_a and in_b:
            raise InvalidAdapter(f"{self.where}: both lists of modules match {site.name!r}", field="use_bdlora")
        if self.is_strict and not (in_a or in_b):
            raise InvalidAdapter(
                f"{self.where}: match_strict is set, but neither list matches {site.name!r}", field="use_bdlora"
            )
        return Blocks(self.nblocks if in_a else 1, self.nblocks if in_b else 1)
