"""An adapter's directory without PEFT: for tests that start a process and care for no numbers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_adapter(directory: Path, base: Path, rank: int, **changes: object) -> Path:
    """A LoRA on the first q_proj of ``base``; ``changes`` are keys of its config."""
    config = json.loads((base / "config.json").read_text())
    hidden = config["hidden_size"]
    out = config["num_attention_heads"] * config["head_dim"]
    directory.mkdir(parents=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    torch.manual_seed(rank)
    tensors = {
        f"{name}.lora_A.weight": torch.randn(rank, hidden),
        f"{name}.lora_B.weight": torch.randn(out, rank),
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings | changes))
    return directory
