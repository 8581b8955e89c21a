"""What every side is given to do: prompts of random token ids, and random LoRA adapters that change the output.

Prompts are new for every case and repeat (both sides of a ratio get the same ones), so that a prefix cache never helps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

RANKS = (8, 16, 32, 64)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT_TOKENS = (32, 64)


@dataclass(frozen=True, slots=True)
class Row:
    """One request: prompt token ids, and the name of its adapter ("" is the base)."""

    prompt: tuple[int, ...]
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """Rows to be answered together, greedily, with exactly ``num_tokens`` new tokens each."""

    rows: tuple[Row, ...]
    num_tokens: int


class Side(Protocol):
    """One thing that is measured."""

    def run(self, job: Job) -> list[list[int]]:
        """The new token ids of every row, in order."""
        ...


def make_job(size: int, adapters: tuple[str, ...], num_tokens: int, *, vocab_size: int, seed: str) -> Job:
    """``size`` rows; with adapters, equal runs of rows for each, in order."""
    source = random.Random(seed)
    rows = []
    for index in range(size):
        prompt = tuple(source.randrange(vocab_size // 2) for _ in range(source.randint(*PROMPT_TOKENS)))
        rows.append(Row(prompt, adapters[index * len(adapters) // size] if adapters else ""))
    return Job(tuple(rows), num_tokens)


def make_adapters(model_dir: Path, out: Path, ranks: tuple[int, ...] = RANKS) -> dict[str, Path]:
    """Write one random PEFT adapter per rank on all seven linears, none of whose factors is zero. Name -> directory:
    ``r16``, and ``r16-2`` for the second of that rank."""
    return dict(_make_adapters(model_dir, out, ranks))


def _make_adapters(model_dir: Path, out: Path, ranks: tuple[int, ...]) -> Iterator[tuple[str, Path]]:
    config = AutoConfig.from_pretrained(model_dir)
    for index, rank in enumerate(ranks):
        nth = 1 + ranks[:index].count(rank)
        torch.manual_seed(rank + 1000 * (nth - 1))
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        model = get_peft_model(base, lora, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        name = f"r{rank}" if nth == 1 else f"r{rank}-{nth}"
        model.save_pretrained(out / name)
        yield name, out / name
