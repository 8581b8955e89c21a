"""The other side of every exactness claim: transformers + PEFT, one sequence at a time, float32, greedy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.variants import calculate_alora_offsets
from transformers import AutoModelForCausalLM

#: a checkpoint of which a copy may be kept
TINY_BYTES = 16 << 20
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base_dir: Path, out_dir: Path, *, seed: int, strength: float = 0.3, **config: Any) -> Path:
    """A PEFT adapter with random non-zero factors, written as PEFT writes it."""
    torch.manual_seed(seed)
    model = get_peft_model(pretrained(base_dir), LoraConfig(**config))
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
        self._model = base = pretrained(base_dir)
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

    @torch.no_grad()
    def picks(self, adapter: str | None, prompt: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """The next token after ``prompt`` and each beginning of ``tokens``, all in one pass: ``tokens`` if, and only
        if, they are the greedy ones."""
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        with self._using(adapter):
            picked: list[int] = self._model(input_ids=ids).logits[0, len(prompt) - 1 :].argmax(-1).tolist()
        return picked

    def logits(self, adapter: str | None, prompt: Sequence[int], max_tokens: int) -> list[torch.Tensor]:
        """The logits rows ``[V]`` that the greedy tokens are drawn from."""
        with self._using(adapter):
            return self._run(prompt, max_tokens)

    @torch.no_grad()
    def shortfalls(self, adapter: str | None, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """How far below the best logit each of ``tokens`` was when it was picked, in standard deviations of its row."""
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        with self._using(adapter):
            rows = self._model(input_ids=ids).logits[0, len(prompt) - 1 :].float()
        picked = rows.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        shortfalls: list[float] = ((rows.amax(1) - picked) / rows.std(1)).tolist()
        return shortfalls

    @contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        if adapter is not None:
            self._model.set_adapter(adapter)
        with self._model.disable_adapter() if adapter is None and self._names else nullcontext():
            yield

    @torch.no_grad()
    def _run(self, prompt: Sequence[int], max_tokens: int) -> list[torch.Tensor]:
        rows: list[torch.Tensor] = []
        ids, cache = torch.tensor([list(prompt)]), None
        for index in range(max_tokens):
            row, cache = _last_row(self._model, ids, cache, len(prompt) + index)
            rows.append(row)
            ids = row.argmax().view(1, 1)
        return rows


class Alone:
    """A transformers model, adapted in whatever way, that answers one prompt at a time."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()

    @classmethod
    def of(cls, base_dir: Path, adapter: Path | None, *, vocab_size: int = 0) -> Alone:
        """One adapter of any kind, or none, on a base of its own: what PEFT makes of its directory, and nothing else.

        ``vocab_size``: what the base was resized to when the adapter was made; 0: it was not. New rows are NaN here,
        until the adapter brings them.
        """
        return cls.on(fresh(base_dir), adapter, vocab_size=vocab_size)

    @classmethod
    def on(cls, model: Any, adapter: Path | None, *, vocab_size: int = 0) -> Alone:
        """The same on a model that is nobody else's."""
        if vocab_size:
            _widen(model, vocab_size)
        return cls(model if adapter is None else with_adapters(model, {"default": adapter}))

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The next ``max_tokens`` tokens; the end of sequence is not looked at."""
        return [int(row.argmax()) for row in self.rows(prompt, max_tokens)]

    @torch.no_grad()
    def rows(self, prompt: Sequence[int], max_tokens: int) -> list[torch.Tensor]:
        """The logits rows ``[V]`` that the greedy tokens are drawn from."""
        rows: list[torch.Tensor] = []
        ids, cache = torch.tensor([list(prompt)]), None
        offset = self._offset(ids)
        for index in range(max_tokens):
            row, cache = _last_row(self._model, ids, cache, len(prompt) + index, **_invoked(offset, index))
            rows.append(row)
            ids = row.argmax().view(1, 1)
        return rows

    @torch.no_grad()
    def prompt_rows(self, prompt: Sequence[int]) -> torch.Tensor:
        """The logits ``[T, V]`` at every token of ``prompt``."""
        ids = torch.tensor([list(prompt)])
        rows: torch.Tensor = self._model(input_ids=ids, **_invoked(self._offset(ids), 0)).logits[0].float()
        return rows

    def _offset(self, ids: torch.Tensor) -> list[int | None] | None:
        """How many tokens from the end an aLoRA begins; None of any other kind."""
        configs = getattr(self._model, "peft_config", {})
        if not any(getattr(config, "alora_invocation_tokens", None) for config in configs.values()):
            return None
        offsets: list[int | None] = calculate_alora_offsets(configs, "default", ids)
        return offsets


def _last_row(model: Any, ids: torch.Tensor, cache: Any, length: int, **further: Any) -> tuple[torch.Tensor, Any]:
    """The logits ``[V]`` of the last of ``ids``, which end a sequence of ``length``, and what is kept for the next."""
    if model.config.model_type == "mamba2":  # it knows no positions
        key = "cache_params"
    else:
        key, positions = "past_key_values", torch.arange(length - ids.shape[1], length)
        further["position_ids"] = positions.unsqueeze(0)  # not all families count what is kept by themselves
    out = model(input_ids=ids, use_cache=True, **{key: cache}, **further)
    return out.logits[0, -1].float(), out[key]


def fresh(base_dir: Path) -> Any:
    """The checkpoint in transformers, float32, with its plainest attention; nobody else's."""
    return pretrained(base_dir, attention="eager")


def pretrained(base_dir: Path, dtype: torch.dtype = torch.float32, *, attention: str | None = None) -> Any:
    """The checkpoint in transformers, nobody else's. A tiny one is read once and copied, which takes a third as long;
    what is written over is read anew."""
    files = sorted(base_dir.iterdir())
    if sum(file.stat().st_size for file in files) > TINY_BYTES:
        return _read(base_dir, dtype, attention)
    return deepcopy(_read_once(base_dir, dtype, attention, tuple((file, file.stat().st_mtime_ns) for file in files)))


def with_adapters(model: Any, adapters: Mapping[str, Path]) -> Any:
    """``model`` with adapters by PEFT; the first is active."""
    with warnings.catch_warnings(), on_every_module():
        _ignore_advice()
        for index, (name, path) in enumerate(adapters.items()):
            if index == 0:
                model = PeftModel.from_pretrained(model, str(path), adapter_name=name)
            else:
                model.load_adapter(str(path), adapter_name=name)
    return model


def on_every_module() -> AbstractContextManager[object]:
    """While PEFT puts adapters around ``out_proj`` of state-space layers too.

    It refuses them in some families, whose fused kernels of training read that weight past any adapter. The layers that
    run here call the module, and so what is around it.
    """
    return patch("peft.tuners.tuners_utils._check_lora_target_modules_mamba", lambda *_: None)


def _read(base_dir: Path, dtype: torch.dtype, attention: str | None) -> Any:
    return AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype, attn_implementation=attention).eval()


@lru_cache(maxsize=16)
def _read_once(base_dir: Path, dtype: torch.dtype, attention: str | None, files: tuple[tuple[Path, int], ...]) -> Any:
    return _read(base_dir, dtype, attention)


@torch.no_grad()
def _widen(model: Any, vocab_size: int) -> None:
    known = int(model.config.vocab_size)
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight[known:] = float("nan")


def _invoked(offset: list[int | None] | None, generated: int) -> dict[str, Any]:
    """What tells PEFT where an aLoRA begins, which looks for it in the tokens of one forward pass otherwise."""
    if offset is None:
        return {}
    return {"alora_offsets": [None if n is None else n + generated for n in offset]}


def _ignore_advice() -> None:
    """What PEFT says of adapters that are meant as they are."""
    for message in (
        "Specified to not (save|load) vera_A",
        "`lora_bias=True` was passed",
        "Unsupported layer type",
        "The following rank_pattern keys did not match",  # those of AdaLoRA, which reads them elsewhere
        "Model has `tie_word_embeddings=True`",
    ):
        warnings.filterwarnings("ignore", message=message)
