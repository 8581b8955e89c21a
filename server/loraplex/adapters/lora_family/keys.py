"""The rule of every key of peft 0.21's LoraConfig (tuners/lora/config.py), for all kinds of the LoRA family."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from loraplex.adapters.reading.keys import (
    COMMON_KEYS,
    KeyRules,
    harmless,
    is_bool,
    is_bool_or_text,
    is_list,
    is_list_or_object,
    is_number,
    is_object,
    is_text,
    refused,
    served,
)
from loraplex.adapters.reading.ranked_targets import RANKED_TARGET_KEYS

_CHANGED_BASE: Final = (
    "it assumes a changed base model; PiSSA, OLoRA, CorDA and LoRA-GA are converted where they were trained: "
    "save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL_ADAPTER)"
)
_OWN_MODEL: Final = "it is a model of another shape"
#: initialisations that leave the base as it is, so that nothing is left of them in what is served
_PLAIN_INITS: Final = (True, False, "gaussian", "eva", "orthogonal", "mica")
LORA_KEYS: Final[KeyRules] = MappingProxyType(
    {
        **COMMON_KEYS,
        **RANKED_TARGET_KEYS,
        "lora_alpha": served(),
        "use_rslora": served(is_bool),
        "use_dora": served(is_bool),
        "use_bdlora": served(is_object),
        "alora_invocation_tokens": served(is_list),
        "lora_bias": served(is_bool),
        "bias": served(),
        "ensure_weight_tying": served(is_bool),
        "modules_to_save": served(is_list),
        "trainable_token_indices": served(is_list_or_object),
        "lora_dropout": harmless(is_number),
        "runtime_config": harmless(is_object),
        # of transposed weights (Conv1D), which no served model has; PEFT ignores it for linear layers and embeddings
        "fan_in_fan_out": harmless(is_bool),
        # read only where another key, refused below, asks for it
        "megatron_core": harmless(is_text),
        "loftq_config": harmless(is_object),
        "eva_config": harmless(is_object),
        "corda_config": harmless(is_object),
        "lora_ga_config": harmless(is_object),
        "qalora_group_size": harmless(is_number),
        "init_lora_weights": refused(is_bool_or_text, *_PLAIN_INITS, hint=_CHANGED_BASE),
        "use_qalora": refused(is_bool, False, hint="it averages groups of a GPTQ layer's inputs"),
        "layer_replication": refused(is_list, None, [], hint=_OWN_MODEL),
        "target_parameters": refused(is_list, None, [], hint="only whole modules are adapted"),
        "megatron_config": refused(is_object, None, hint="only transformers' own layers are served"),
        "velora_config": refused(is_object, None),
        "monteclora_config": refused(is_object, None, hint="it samples its weights anew"),
        "arrow_config": refused(is_object, None, hint="it routes between other adapters"),
        "kasa_config": refused(is_object, None, hint="it truncates the base model's weights"),
    }
)
