"""TRAINABLE_TOKENS: rows of the embedding for a few tokens, and nothing else.

Source: peft 0.21 tuners/trainable_tokens. Other kinds may have such rows beside their own tensors (LoRA's key
``trainable_token_indices``), so ``adapters/saved/trained_tokens.py`` reads them for all; this kind brings the config's
keys.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.kinds.base import Lowered
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import COMMON_KEYS, KeyRules, harmless, is_bool, is_list, served
from loraplex.errors import InvalidAdapter

#: of peft 0.21's TrainableTokensConfig (tuners/trainable_tokens/config.py)
TRAINABLE_TOKENS_KEYS: Final[KeyRules] = MappingProxyType(
    {
        **COMMON_KEYS,
        "token_indices": served(is_list),
        "target_modules": served(),
        # of the rows before training; the trained ones are saved
        "init_weights": harmless(is_bool),
    }
)


class TrainableTokensKind:
    """Trained rows alone."""

    name = "trainable_tokens"

    @property
    def keys(self) -> KeyRules:
        return TRAINABLE_TOKENS_KEYS

    def matches(self, config: AdapterConfig) -> bool:
        return config.peft_type == "TRAINABLE_TOKENS"

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        """No site of its own: the rows are read for every kind. Raises InvalidAdapter: no token is named."""
        if not files.config.has("token_indices"):
            raise InvalidAdapter(
                f"{files.config.where}: token_indices is missing or empty; name the trained tokens",
                field="token_indices",
            )
        return Lowered({})
