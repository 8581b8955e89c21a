"""What makes two adapters the same one: all that is served of them, and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.load import load_adapter
from loraplex.adapters.reading.source import any_directory
from tests.fakes_adapters import save_peft, tiny_llama, view_of, write_adapter


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


def load(path: Path, base: BaseView) -> AdapterDelta:
    return load_adapter(any_directory(str(path)), base, max_bytes=1 << 24)


def test_uid_is_the_content(tmp_path: Path, model: LlamaForCausalLM) -> None:
    save_peft(copy.deepcopy(model), tmp_path / "a", target_modules=["q_proj"])
    save_peft(copy.deepcopy(model), tmp_path / "b", target_modules=["q_proj"])
    base = view_of(model)
    first = load(tmp_path / "a", base).uid
    assert len(first) == 32
    assert load(tmp_path / "b", base).uid != first
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    tensors = (tmp_path / "a/adapter_model.safetensors").read_bytes()
    write_adapter(tmp_path / "c", dict(reversed(config.items())), tensors)
    assert load(tmp_path / "c", base).uid == first
    write_adapter(tmp_path / "d", config | {"lora_alpha": 99}, tensors)
    assert load(tmp_path / "d", base).uid != first


def test_the_order_of_patterns_is_content(tmp_path: Path, model: LlamaForCausalLM) -> None:
    """Of patterns the first that matches counts, so that the same ones in another order are another adapter."""
    patterns = {"q_proj": 3.0, ".*_proj": 16.0}
    save_peft(copy.deepcopy(model), tmp_path / "a", target_modules=["q_proj"])
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    tensors = (tmp_path / "a/adapter_model.safetensors").read_bytes()
    deltas = []
    for name, order in (("b", patterns), ("c", dict(reversed(patterns.items())))):
        write_adapter(tmp_path / name, config | {"alpha_pattern": order}, tensors)
        deltas.append(load(tmp_path / name, view_of(model)))
    scales = [delta.sites["model.layers.0.self_attn.q_proj"].low_rank.scale * config["r"] for delta in deltas]
    assert scales == [3.0, 16.0]
    assert deltas[0].uid != deltas[1].uid
