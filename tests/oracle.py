"""The other side of every exactness claim: transformers + PEFT, one sequence at a time, float32, greedy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base_dir: Path, out_dir: Path, *, seed: int, strength: float = 0.3, **config: Any) -> Path:
    """A PEFT adapter with random non-zero factors, written as PEFT writes it."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * strength)
    with warnings.catch_warnings():  # PEFT stores a targeted embedding's base beside the factors, and says so
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        model.save_pretrained(str(out_dir))
    return out_dir


class Oracle:
    """A base with named adapters; answers one prompt at a time."""

    def __init__(self, base_dir: Path, adapters: dict[str, Path]) -> None:
        base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        self._model: Any = base.eval()
        self._names = list(adapters)
        for index, (name, path) in enumerate(adapters.items()):
            if index == 0:
                self._model = PeftModel.from_pretrained(base, str(path), adapter_name=name).eval()
            else:
                self._model.load_adapter(str(path), adapter_name=name)

    def add_weighted(self, name: str, parts: dict[str, float]) -> None:
        """A weighted sum under a new name, exactly (PEFT's `cat`)."""
        self._model.add_weighted_adapter(list(parts), list(parts.values()), name, combination_type="cat")

    def greedy(self, adapter: str | None, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The next ``max_tokens`` tokens; the end of sequence is not looked at."""
        return [int(logits.argmax()) for logits in self.logits(adapter, prompt, max_tokens)]

    def logits(self, adapter: str | None, prompt: Sequence[int], max_tokens: int) -> list[torch.Tensor]:
        """The logits rows ``[V]`` that the greedy tokens are drawn from."""
        if adapter is None and self._names:
            with self._model.disable_adapter():
                return self._run(prompt, max_tokens)
        if adapter is not None:
            self._model.set_adapter(adapter)
        return self._run(prompt, max_tokens)

    @torch.no_grad()
    def shortfalls(self, adapter: str | None, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """How far below the best logit each of ``tokens`` was when it was picked, in standard deviations of its row."""
        if adapter is not None:
            self._model.set_adapter(adapter)
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        if adapter is None and self._names:
            with self._model.disable_adapter():
                rows = self._model(input_ids=ids).logits[0, len(prompt) - 1 :].float()
        else:
            rows = self._model(input_ids=ids).logits[0, len(prompt) - 1 :].float()
        picked = rows.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        shortfalls: list[float] = ((rows.amax(1) - picked) / rows.std(1)).tolist()
        return shortfalls

    @torch.no_grad()
    def _run(self, prompt: Sequence[int], max_tokens: int) -> list[torch.Tensor]:
        rows: list[torch.Tensor] = []
        ids, cache = torch.tensor([list(prompt)]), None
        for _ in range(max_tokens):
            out = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1].float())
            ids = rows[-1].argmax().view(1, 1)
        return rows
