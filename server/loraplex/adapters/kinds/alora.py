"""aLoRA (activated LoRA): the base before the invocation tokens' last place in the prompt, LoRA from there on.

Sources: arXiv:2504.12397; peft 0.21 tuners/lora/variants.py ``ALoraLinearVariant`` and ``calculate_alora_offsets``.
Before that place it may change nothing, because pages of the KV cache there are shared with the base.
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
from loraplex.adapters.reading.keys import ConfigReader, KeyRules
from loraplex.errors import InvalidAdapter, UnsupportedFeature
from loraplex.models.sites import SiteKind

_KEY = "alora_invocation_tokens"
#: an adapter is tried at load with a prompt that holds them all, whose logits are looked at
MAX_INVOCATION_TOKENS = 256
#: keys by which an adapter changes every token, invoked or not
_EVERYWHERE = ("modules_to_save", "trainable_token_indices")


@dataclass(frozen=True, slots=True)
class AloraKind:
    """aLoRA, with LoRA's or rsLoRA's scale."""

    name: str = "alora"

    @property
    def keys(self) -> KeyRules:
        return LORA_KEYS

    def matches(self, config: AdapterConfig) -> bool:
        return config.peft_type == "LORA" and lora_variant(config) == _KEY

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        """See ``AdapterKind.lower``."""
        config = files.config
        tokens = ConfigReader(config).token_ids(_KEY, config.values[_KEY])
        if len(tokens) > MAX_INVOCATION_TOKENS:
            raise UnsupportedFeature(
                f"{config.where}: {_KEY} has {len(tokens)} tokens; at most {MAX_INVOCATION_TOKENS} are served",
                field=_KEY,
            )
        if max(tokens) >= base.vocab_size:
            raise InvalidAdapter(
                f"{config.where}: {_KEY} has {max(tokens)}; the model's vocabulary is 0 to {base.vocab_size - 1}",
                field=_KEY,
            )
        for key in _EVERYWHERE:
            if config.has(key):
                raise _refusal(config, key, "it changes every token")
        reading = read_lora(files, base)
        if reading.biases:
            raise _refusal(config, "bias", "a bias changes every token")
        for pair in reading.pairs:
            if pair.site.kind is not SiteKind.LINEAR:
                raise _refusal(
                    config, "target_modules", f"{pair.site.name!r} is an embedding, and PEFT has none for it"
                )
        return Lowered(reading.completed({pair.site.name: pair.delta(base.dtype) for pair in reading.pairs}), tokens)


def _refusal(config: AdapterConfig, key: str, reason: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"{config.where}: {key} together with {_KEY} is not served: {reason}", field=key)
