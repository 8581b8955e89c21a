"""LoRA and rsLoRA: ``scale * B A`` with ``scale = alpha / r`` or ``alpha / sqrt(r)``, rank and alpha per module.

Sources: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; peft 0.21 tuners/lora/layer.py ``update_layer``.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.kinds.base import Lowered
from loraplex.adapters.lora_family.keys import LORA_KEYS
from loraplex.adapters.lora_family.plan import lora_variant
from loraplex.adapters.lora_family.reading import read_lora
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import KeyRules


@dataclass(frozen=True, slots=True)
class LoraKind:
    """LoRA (``use_rslora`` false) or rsLoRA (true)."""

    name: str
    use_rslora: bool

    @property
    def keys(self) -> KeyRules:
        return LORA_KEYS

    def matches(self, config: AdapterConfig) -> bool:
        is_plain = config.peft_type == "LORA" and not lora_variant(config)
        return is_plain and config.flag("use_rslora") is self.use_rslora

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        """See ``AdapterKind.lower``."""
        reading = read_lora(files, base)
        return Lowered(reading.completed({pair.site.name: pair.delta(base.dtype) for pair in reading.pairs}))
