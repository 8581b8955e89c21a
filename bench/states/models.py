"""What is measured: a Mamba2 of 130 M parameters with random weights, and random adapters on both projections.

PEFT does not put adapters on ``out_proj`` of this model, so they are written as the files that other trainers make; the
oracle is the base with their products added to its weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mamba2Config, PreTrainedModel

VOCAB_SIZE: Final = 50288
#: state-spaces/mamba2-130m
SHAPE: Final = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "num_heads": 24,
    "head_dim": 64,
    "state_size": 128,
    "n_groups": 1,
    "expand": 2,
    "chunk_size": 256,
    "tie_word_embeddings": True,
}
RANKS: Final = (8, 16, 32, 64)
TARGETS: Final = ("in_proj", "out_proj")
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def make_base(out: Path, seed: int = 0) -> Path:
    """The checkpoint, in bfloat16."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(Mamba2Config(**SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(out)
    return out


def make_adapters(base: Path, out: Path) -> dict[str, Path]:
    """One LoRA of each rank on every in_proj and out_proj, none of whose factors is zero. Name -> directory."""
    return dict(_make_adapters(base, out))


def _make_adapters(base: Path, out: Path) -> Iterator[tuple[str, Path]]:
    with safe_open(base / "model.safetensors", framework="pt") as file:
        sites = [key for key in file.keys() if key.endswith(tuple(f"{name}.weight" for name in TARGETS))]  # noqa: SIM118
        shapes = {key.removesuffix(".weight"): file.get_slice(key).get_shape() for key in sites}
    for rank in RANKS:
        torch.manual_seed(rank)
        tensors = {}
        for site, (rows, cols) in shapes.items():
            prefix = f"base_model.model.{site}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, cols, dtype=torch.bfloat16) / cols**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, dtype=torch.bfloat16) * 0.02
        path = out / f"r{rank}"
        path.mkdir(parents=True)
        save_file(tensors, path / _WEIGHTS)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(TARGETS)}
        (path / _CONFIG).write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
        yield path.name, path


def merged(base: Path, adapter: Path | None) -> PreTrainedModel:
    """The base in float32, an adapter's products added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        _add(dict(model.named_parameters()), adapter)
    return model


def _add(parameters: Mapping[str, torch.Tensor], adapter: Path) -> None:
    config = json.loads((adapter / _CONFIG).read_text())
    tensors = load_file(adapter / _WEIGHTS)
    for name in [name for name in tensors if "lora_A" in name]:
        a, b = tensors[name].float(), tensors[name.replace("lora_A", "lora_B")].float()
        weight = parameters[name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")]
        with torch.no_grad():
            weight += config["lora_alpha"] / config["r"] * (b @ a)
