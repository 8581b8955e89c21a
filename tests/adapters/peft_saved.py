"""Adapters with saved modules, trained tokens and added vocabulary, made by PEFT; and two ways to compute with them.

``reloaded`` is the oracle: PEFT over the (resized) base. ``dense_copy`` is a plain transformers model all of whose
weights were set from what the adapter was lowered to: nothing of the server computes it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loraplex.adapters.delta import AdapterDelta, SiteDelta
from loraplex.adapters.load import load_adapter
from loraplex.adapters.reading.source import any_directory
from loraplex.models.sites import SiteKind
from tests.fakes_adapters import load_peft, sites_of, view_of
from tests.tiny import VOCAB_SIZE, oracle

#: how far trained values are moved from where they started
STRENGTH = 0.3
#: bytes that an adapter may take
LIMIT = 1 << 24


@dataclass(frozen=True)
class SavedCase:
    """One adapter. ``vocab_size``: what the base's is resized to before; 0: as it is. ``save``: save_pretrained's
    options. ``train``: what else happens to the model before it is saved."""

    config: Callable[[], peft.PeftConfig]
    vocab_size: int = 0
    save: Mapping[str, Any] = field(default_factory=dict)
    train: Callable[[peft.PeftModel], None] = lambda model: None


def lora(**config: Any) -> Callable[[], peft.PeftConfig]:
    """A small LoRA's config, with what a test adds."""
    settings = {"r": 2, "lora_alpha": 5, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **config}
    return lambda: peft.LoraConfig(**copy.deepcopy(settings))


def make(case: SavedCase, checkpoint: Path, path: Path, *, strength: float = STRENGTH) -> None:
    """Write the adapter below ``path``, everything that PEFT trains moved at random by ``strength``."""
    with quiet():
        torch.manual_seed(1)
        adapted = peft.get_peft_model(resized(oracle(checkpoint), case.vocab_size), case.config())
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * strength)
        case.train(adapted)
        adapted.save_pretrained(path, **case.save)


def load(path: Path, checkpoint: Path, dtype: torch.dtype = torch.float32) -> AdapterDelta:
    """The adapter in ``path``, lowered for the base in ``checkpoint``."""
    return load_adapter(any_directory(str(path)), view_of(oracle(checkpoint, dtype), dtype), max_bytes=LIMIT)


def reloaded(checkpoint: Path, path: Path, vocab_size: int = 0) -> peft.PeftModel:
    """What PEFT makes of the files, over a base resized as its documentation asks."""
    with quiet():
        return load_peft(resized(oracle(checkpoint), vocab_size), path).eval()


def resized(model: PreTrainedModel, vocab_size: int) -> PreTrainedModel:
    """The model with its vocabulary resized, as one does before training new tokens; 0: as it is."""
    if vocab_size:
        torch.manual_seed(vocab_size)
        model.resize_token_embeddings(vocab_size)
    return model


def dense_copy(checkpoint: Path, delta: AdapterDelta) -> PreTrainedModel:
    """The base model, untied, with the adapter merged into its weights, and as wide as the adapter's vocabulary."""
    base = oracle(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint)
    config.tie_word_embeddings, config.vocab_size = False, delta.vocab_size or config.vocab_size
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for site in sites_of(base):
            if site.kind is SiteKind.VECTOR:
                vector, own = base.get_parameter(site.name), delta.sites.get(site.name)
                model.get_parameter(site.name).copy_(vector if own is None else own.merged(vector, None)[0])
                continue
            weight, bias = merged(base.get_submodule(site.name), delta.sites.get(site.name), site.kind)
            module = model.get_submodule(site.name)
            assert module.weight.shape == weight.shape, site.name
            module.weight.copy_(weight)
            if bias is not None:
                module.bias = torch.nn.Parameter(bias)
    return model


def merged(
    module: torch.nn.Module, delta: SiteDelta | None, kind: SiteKind
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A module's weight and bias with the site's change in them."""
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    if delta is None:
        return weight, bias
    if kind is SiteKind.EMBEDDING:  # rows are tokens, but all other parts are [hidden, vocab]
        num_tokens = len(weight)
        rows, _ = SiteDelta(rows=delta.rows).merged(weight, None)
        known, bias = replace(delta, rows=None).merged(rows[:num_tokens].T, None)
        return torch.cat(((known if bias is None else known + bias.unsqueeze(1)).T, rows[num_tokens:])), None
    changed, bias = delta.merged(weight, None if bias is None else bias.detach())
    return changed.reshape(weight.shape if kind is SiteKind.CONV else changed.shape), bias


def logits(model: torch.nn.Module, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """Of a prompt that holds every token."""
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(order[None]).logits[0]


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of ties and sizes, which is what these adapters are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
