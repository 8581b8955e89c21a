"""Every kind of the LoRA family equals PEFT module by module, on models with and without biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig
from transformers import PreTrainedModel

from loraplex.adapters.delta import AdapterDelta
from tests.adapters.peft_sites import check_kind, check_sites, load, randomize, save_adapter
from tests.fakes_adapters import view_of
from tests.tiny import ALL_LINEAR, tiny_model

EVERYTHING = [*ALL_LINEAR, "embed_tokens", "lm_head"]
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 5, r".*layers\.1\..*up_proj": 3},
    "alpha_pattern": {"layers.0.mlp.down_proj": 7, "o_proj|lm_head": 3},
}
BLOCKS = BdLoraConfig(
    target_modules_bd_a=["o_proj", "down_proj"],
    target_modules_bd_b=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
    nblocks=2,
)
SOME_BLOCKS = BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=4, match_strict=False)
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"target_modules": EVERYTHING, **PATTERNS}),
    "rslora": ("rslora", {"target_modules": EVERYTHING, "use_rslora": True, **PATTERNS}),
    "lora_bias": ("lora", {"target_modules": [*ALL_LINEAR, "lm_head"], "lora_bias": True, **PATTERNS}),
    "lora_bias rslora": ("rslora", {"target_modules": ["q_proj"], "lora_bias": True, "use_rslora": True}),
    "bias all": ("lora", {"target_modules": ["q_proj", "o_proj", "embed_tokens"], "bias": "all"}),
    "bias lora_only": ("lora", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "both biases": ("lora", {"target_modules": ["k_proj", "o_proj"], "bias": "all", "lora_bias": True}),
    "fan_in_fan_out": ("lora", {"target_modules": ["embed_tokens"], "fan_in_fan_out": True}),
    "one layer": ("lora", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}),
    "layers": (
        "lora",
        {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": "layers", "bias": "lora_only"},
    ),
    "exclude": ("lora", {"target_modules": r".*_proj", "exclude_modules": r".*0\..*(q|k)_proj"}),
    "mica": ("lora", {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"}),
    "orthogonal": ("lora", {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "orthogonal"}),
    "gaussian": ("lora", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "dora": ("dora", {"target_modules": EVERYTHING, "use_dora": True, **PATTERNS}),
    "dora rslora": ("dora", {"target_modules": EVERYTHING, "use_dora": True, "use_rslora": True, **PATTERNS}),
    "dora bias": ("dora", {"target_modules": ["q_proj", "v_proj", "o_proj"], "use_dora": True, "bias": "all"}),
    "dora embedding": ("dora", {"target_modules": ["embed_tokens"], "use_dora": True, "fan_in_fan_out": True}),
    "bdlora": ("bdlora", {"target_modules": list(ALL_LINEAR), "r": 4, "use_bdlora": BLOCKS}),
    "bdlora rslora": ("bdlora", {"target_modules": ["o_proj"], "r": 4, "use_bdlora": BLOCKS, "use_rslora": True}),
    "bdlora and lora": (
        "bdlora",
        {
            "target_modules": ["q_proj", "o_proj", "v_proj"],
            "use_bdlora": SOME_BLOCKS,
            "rank_pattern": {"q_proj": 8},
            "lora_bias": True,
            "bias": "lora_only",
        },
    ),
    "alora": ("alora", {"target_modules": [*ALL_LINEAR, "lm_head"], "alora_invocation_tokens": [7, 8, 7]}),
    "alora rslora": (
        "alora",
        {"target_modules": ["q_proj"], "alora_invocation_tokens": [95], "use_rslora": True, "lora_bias": True},
    ),
    "no alora": ("lora", {"target_modules": ["q_proj"], "alora_invocation_tokens": []}),
}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.set_num_threads(1)
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def tied() -> PreTrainedModel:
    return tiny_model("qwen2", tie_word_embeddings=True)


def config_of(**keys: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "task_type": "CAUSAL_LM", **keys})


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
@pytest.mark.parametrize("name", WHOLE)
def test_every_site_equals_peft(tmp_path: Path, model: PreTrainedModel, name: str) -> None:
    kind, keys = WHOLE[name]
    # PEFT counts from the prompt's end: with as many tokens as there are rows, every row is invoked
    arguments = {"alora_offsets": [1 << 20]} if kind == "alora" else None
    delta = check_kind(model, tmp_path, config_of(**keys), arguments)
    assert delta.kind == kind
    assert delta.invocation_tokens == tuple(keys.get("alora_invocation_tokens", ()))
    assert bool(delta.exclusive) is (kind == "dora")
