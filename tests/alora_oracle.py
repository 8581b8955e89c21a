"""The other side of activated LoRA: PEFT's own ``generate``, and for sums PEFT's own layers, each adapter with the
offset that PEFT computes for it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant, calculate_alora_offsets

from tests.oracle import pretrained


class AloraOracle:
    """A base with adapters by name, activated ones and plain ones; one prompt at a time, float32, greedy."""

    def __init__(self, base_dir: Path, adapters: Mapping[str, Path]) -> None:
        names = list(adapters)
        self._model: Any = PeftModel.from_pretrained(
            pretrained(base_dir), str(adapters[names[0]]), adapter_name=names[0]
        ).eval()
        for name in names[1:]:
            self._model.load_adapter(str(adapters[name]), adapter_name=name)

    @torch.no_grad()
    def generated(self, adapter: str, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """What PEFT generates with one adapter; the end of sequence is not looked at."""
        self._model.set_adapter(adapter)
        ids = torch.tensor([list(prompt)])
        config = copy.deepcopy(self._model.generation_config)
        config.update(eos_token_id=self._model.config.vocab_size, max_new_tokens=max_tokens, do_sample=False)
        out = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return [int(token) for token in out[0, len(prompt) :]]

    @torch.no_grad()
    def greedy(self, weights: Mapping[str, float], prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The same for a weighted sum; empty: the base."""
        tokens = list(prompt)
        for _ in range(max_tokens):
            tokens.append(int(self._logits(weights, prompt, tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    @torch.no_grad()
    def prompt_logprobs(self, weights: Mapping[str, float], prompt: Sequence[int]) -> list[float]:
        """Of each prompt token but the first."""
        logprobs = self._logits(weights, prompt, prompt)[:-1].log_softmax(-1)
        values: list[float] = logprobs.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1).tolist()
        return values

    def _logits(self, weights: Mapping[str, float], prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """``[T, V]`` of ``tokens``, which begin with ``prompt``; nothing is cached."""
        ids = torch.tensor([list(tokens)])
        if not weights:
            with self._model.disable_adapter():
                return self._forward(ids)
        grown = len(tokens) - len(prompt)
        offsets = {name: self._offset(name, prompt, grown) for name in weights}
        with self._active(weights), _own_offsets(offsets):
            return self._forward(ids)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model.base_model.model(input_ids=ids).logits[0]
        return logits

    def _offset(self, name: str, prompt: Sequence[int], grown: int) -> int | None:
        """Counted from the end, as PEFT does; a prompt that grew by generated tokens keeps its start."""
        found: int | None = calculate_alora_offsets(self._model.peft_config, name, torch.tensor([list(prompt)]))[0]
        return None if found is None else found + grown

    @contextmanager
    def _active(self, weights: Mapping[str, float]) -> Iterator[None]:
        """All of them at once, each scaled."""
        self._model.base_model.set_adapter(list(weights))
        layers = [module for module in self._model.modules() if isinstance(module, LoraLayer)]
        before = [dict(layer.scaling) for layer in layers]
        for layer in layers:
            layer.scaling.update(
                {name: layer.scaling[name] * w for name, w in weights.items() if name in layer.scaling}
            )
        try:
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)


@contextmanager
def _own_offsets(offsets: Mapping[str, int | None]) -> Iterator[None]:
    """PEFT gives all active adapters one offset; give each its own."""
    forward = ALoraLinearVariant.forward
    assert list(inspect.signature(forward).parameters)[:2] == ["module", "active_adapter"]

    def with_own(module: Any, active_adapter: str, x: Any, result: Any, **kwargs: Any) -> Any:
        kwargs["alora_offsets"] = [offsets[active_adapter]]
        return forward(module, active_adapter, x, result, **kwargs)

    with mock.patch.object(ALoraLinearVariant, "forward", staticmethod(with_own)):
        yield
