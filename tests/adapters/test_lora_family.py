"""Every kind of the LoRA family equals PEFT module by module, on models with and without biases."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from transformers import PreTrainedModel

from tests.adapters.peft_sites import check_kind
from tests.tiny import ALL_LINEAR, tiny_model


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def test_lora(tmp_path: Path, model: PreTrainedModel) -> None:
    delta = check_kind(model, tmp_path, peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(ALL_LINEAR)))
    assert delta.kind == "lora"
