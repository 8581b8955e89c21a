"""Adapters of random values as PEFT writes them, for an engine in another process: it takes them from files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.limits.shapes import ModelShape

_PREFIX = "base_model.model.model."
#: of what a module puts out: strong, so that an adapter that is lost somewhere has other tokens
_STRENGTH = 0.3
#: some of those that the check's prompts consist of. With two ranks the first one has them all, and the other none
TRAINED_TOKENS = tuple(range(3, 60, 4))

Write = Callable[[Path, ModelShape, int, torch.dtype], None]
"""Makes a directory an adapter for a shape, from a seed, in a dtype."""


def write_lora(folder: Path, shape: ModelShape, seed: int, dtype: torch.dtype, rank: int = 16) -> None:
    """A LoRA on all linear layers of the decoder."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for module, (inputs, outputs) in _modules(shape):
        a = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
        b = torch.randn(outputs, rank, generator=generator) * (_STRENGTH / math.sqrt(rank))
        tensors |= {f"{module}.lora_A.weight": a.to(dtype), f"{module}.lora_B.weight": b.to(dtype)}
    modules = sorted({module.rpartition(".")[2] for module, _ in _modules(shape)})
    _write(folder, {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}, tensors)


def write_scales(folder: Path, shape: ModelShape, seed: int, dtype: torch.dtype) -> None:
    """An IA3: scales of what k and v put out and of what down takes in."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for module, (inputs, outputs) in _modules(shape):
        name = module.rpartition(".")[2]
        size = {"k_proj": (outputs, 1), "v_proj": (outputs, 1), "down_proj": (1, inputs)}.get(name)
        if size is not None:
            scale = 1 + 2 * _STRENGTH * torch.randn(size, generator=generator)
            tensors[f"{module}.ia3_l"] = scale.to(dtype)
    targets = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    _write(folder, {"peft_type": "IA3", **targets}, tensors)


def write_tokens(folder: Path, shape: ModelShape, seed: int, dtype: torch.dtype) -> None:
    """Trained tokens: rows of its own in the embedding."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(TRAINED_TOKENS), shape.hidden_size, generator=generator) / math.sqrt(shape.hidden_size)
    config = {
        "peft_type": "TRAINABLE_TOKENS",
        "target_modules": "model.embed_tokens",
        "token_indices": list(TRAINED_TOKENS),
    }
    _write(folder, config, {f"{_PREFIX}embed_tokens.trainable_tokens_delta": rows.to(dtype)})


def _modules(shape: ModelShape) -> Iterator[tuple[str, tuple[int, int]]]:
    """PEFT's name and (inputs, outputs) of every linear layer of the decoder."""
    hidden, heads, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj": (hidden, heads),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (heads, hidden),
        "mlp.gate_proj": (hidden, shape.intermediate_size),
        "mlp.up_proj": (hidden, shape.intermediate_size),
        "mlp.down_proj": (shape.intermediate_size, hidden),
    }
    for layer in range(shape.num_layers):
        for name, size in sizes.items():
            yield f"{_PREFIX}layers.{layer}.{name}", size


def _write(folder: Path, config: Mapping[str, object], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"task_type": "CAUSAL_LM", **config}))
    save_file(tensors, folder / "adapter_model.safetensors")
