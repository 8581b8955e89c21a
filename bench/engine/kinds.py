"""Eight adapters of eight kinds, made by PEFT with random weights that all change the output."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.engine.workload import TARGETS

_EVERYWHERE: Final = list(TARGETS)
_CAUSAL_LM: Final = "CAUSAL_LM"

#: name -> PEFT config; ranks and targets as they are published
EIGHT_KINDS: Final[Mapping[str, PeftConfig]] = MappingProxyType(
    {
        "lora": LoraConfig(r=16, lora_alpha=32, target_modules=_EVERYWHERE, task_type=_CAUSAL_LM),
        "rslora": LoraConfig(r=32, lora_alpha=16, use_rslora=True, target_modules=_EVERYWHERE, task_type=_CAUSAL_LM),
        "dora": LoraConfig(r=16, lora_alpha=32, use_dora=True, target_modules=_EVERYWHERE, task_type=_CAUSAL_LM),
        "loha": LoHaConfig(r=4, alpha=4, target_modules=["q_proj", "v_proj"], task_type=_CAUSAL_LM),
        "ia3": IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type=_CAUSAL_LM
        ),
        "norms": LNTuningConfig(
            target_modules=["input_layernorm", "post_attention_layernorm", "norm"], task_type=_CAUSAL_LM
        ),
        "tokens": LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "v_proj"],
            trainable_token_indices=list(range(100, 116)),
            task_type=_CAUSAL_LM,
        ),
        "head": LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type=_CAUSAL_LM
        ),
    }
)


def make_kinds(model_dir: Path, out: Path) -> dict[str, Path]:
    """Write one adapter of each kind for the model in ``model_dir``. Name -> directory."""
    made: dict[str, Path] = {}
    for seed, (name, config) in enumerate(EIGHT_KINDS.items()):
        torch.manual_seed(seed)
        # of the very weights: magnitudes and saved modules are near those they start from
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*", category=UserWarning)
            model = get_peft_model(base, config, autocast_adapter_dtype=False)
            _disturb(model)
            model.save_pretrained(out / name)
        made[name] = out / name
    return made


def _disturb(model: torch.nn.Module) -> None:
    """Move every trained value a little off where training starts, where most kinds change nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                spread = 0.02 if "lora_B" in name or "hada" in name else 0.05
                parameter.add_(torch.randn_like(parameter) * spread)
