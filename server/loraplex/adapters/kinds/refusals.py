"""Why a peft_type that PEFT knows is not served: the end of the message that refuses it.

A kind that comes to serve one takes its line out of here; a test holds this table against PEFT's own list.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_VIRTUAL_TOKENS: Final = "it learns virtual tokens in front of the prompt; adapters change modules here, not prompts"
_PREFIX: Final = "it learns keys and values of tokens that no prompt holds; adapters change modules here, not the cache"
_ROTATION: Final = "it multiplies the base weight by a rotation, which is no change of low rank"
_FULL_RANK: Final = "its change of a weight is of full rank"
_ROUTER: Final = "it mixes factors by a router that looks at each input"
_BASE_SVD: Final = "its directions come from a decomposition of the base weight"
_ELEMENTWISE: Final = "it multiplies the base weight element by element, which is no change of low rank"
_TO_LORA: Final = "convert it to LoRA where it was trained: peft.save_as_lora(DIRECTORY, model, rank)"

#: peft_type -> reason, for every name of peft 0.21's PeftType that no kind serves
REASONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "PROMPT_TUNING": _VIRTUAL_TOKENS,
        "MULTITASK_PROMPT_TUNING": _VIRTUAL_TOKENS,
        "P_TUNING": _VIRTUAL_TOKENS,
        "CPT": _VIRTUAL_TOKENS,
        "PREFIX_TUNING": _PREFIX,
        "CARTRIDGE": _PREFIX,
        "ADAPTION_PROMPT": "it adds an attention over learned tokens to its layers",
        "OFT": _ROTATION,
        "BOFT": _ROTATION,
        "HRA": _ROTATION,
        "ROAD": "it rotates pairs of a layer's outputs, which is no change of low rank",
        "POLY": _ROUTER,
        "XLORA": _ROUTER,
        "LILY": _ROUTER,
        "SHADOW": "it runs a second network beside the base model",
        "ADAMSS": _BASE_SVD,
        "OSF": _BASE_SVD,
        "FROD": _FULL_RANK,
        "SHIRA": _FULL_RANK,
        "SUPERTUNING": _FULL_RANK,
        "DEFT": "its change is computed from the base weight",
        "PEANUT": "its change is computed from the base weight",
        "GLORA": _ELEMENTWISE,
        "HIRA": _ELEMENTWISE,
        "PVERA": "it may draw its change anew for each input",
        "BEFT": "docs/KINDS.md has a kind that serves it, to be installed beside Loraplex",
        "C3A": _TO_LORA,
        "DELORA": _TO_LORA,
        "FOURIERFT": _TO_LORA,
        "GRALORA": _TO_LORA,
        "MISS": _TO_LORA,
        "PSOFT": _TO_LORA,
        "RANDLORA": _TO_LORA,
        "TINYLORA": _TO_LORA,
        "UNILORA": _TO_LORA,
        "VBLORA": _TO_LORA,
        "WAVEFT": _TO_LORA,
        "BONE": "PEFT itself reads it no longer; it went on as MISS",
    }
)
