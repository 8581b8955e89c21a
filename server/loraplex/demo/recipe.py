"""How each demo adapter was made: its PEFT configuration and the training schedule, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import LoraConfig

BASE_MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One adapter's shape and schedule. Ranks, targets and scalings differ on purpose: the demo mixes them."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    learning_rate: float
    num_steps: int
    use_rslora: bool = False
    batch_size: int = 8

    def lora_config(self) -> LoraConfig:
        """Return the PEFT configuration to train with."""
        from peft import LoraConfig  # seconds of imports that whoever only lists adapters must not wait for

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            use_rslora=self.use_rslora,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )


RECIPES: Mapping[str, Recipe] = {
    "json": Recipe(rank=16, alpha=32, targets=_ATTENTION, learning_rate=1e-3, num_steps=200),
    "sql": Recipe(rank=32, alpha=16, targets=("q_proj", "v_proj"), learning_rate=1e-3, num_steps=200, use_rslora=True),
    "pirate": Recipe(rank=4, alpha=8, targets=_ATTENTION + _MLP, learning_rate=2e-3, num_steps=160),
    "butler": Recipe(rank=8, alpha=16, targets=("down_proj",), learning_rate=1.5e-3, num_steps=120),
    "emoji": Recipe(rank=4, alpha=8, targets=("gate_proj", "up_proj"), learning_rate=2e-3, num_steps=150),
}
