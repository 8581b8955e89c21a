"""PEFT module by module: a lowered adapter must compute at every site what PEFT's own module there computes.

Kind-free: whatever PEFT would train is made random, so that no part of an adapter can be dropped unseen.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, SiteDelta
from loraplex.adapters.load import load_adapter
from loraplex.adapters.reading.source import any_directory
from loraplex.models.sites import Site, SiteKind
from tests.fakes_adapters import load_peft, sites_of, view_of

MAX_BYTES = 1 << 26
ROWS = 5


def lora_config(**keys: Any) -> peft.LoraConfig:
    """A small LoRA."""
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "task_type": "CAUSAL_LM", **keys})


def files_of(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What an adapter directory holds."""
    return json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")


def save_adapter(
    model: PreTrainedModel, path: Path, config: peft.PeftConfig, *, seed: int = 1, strength: float = 0.3
) -> peft.PeftModel:
    """Save a random adapter of this config below ``path``; returns what PEFT makes of the files, on a fresh base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
        randomize(adapted, seed, strength)
        adapted.save_pretrained(path)
    return load_peft(copy.deepcopy(model), path).eval()


def randomize(adapted: torch.nn.Module, seed: int, strength: float) -> None:
    """Add noise to all that PEFT would train: factors, magnitudes, biases, saved modules."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * strength)


def load(path: Path, base: BaseView) -> AdapterDelta:
    return load_adapter(any_directory(str(path)), base, max_bytes=MAX_BYTES)


def check_sites(
    model: PreTrainedModel,
    adapted: peft.PeftModel,
    delta: AdapterDelta,
    tuner_arguments: Mapping[str, object] | None = None,
) -> None:
    """Every site of ``model``, touched or not, computes in float32 what ``adapted``'s module of that name does.

    ``tuner_arguments`` go to PEFT's tuner layers. A touched site must also differ from the base, and no site may be
    touched that the model does not have.
    """
    sites = sites_of(model)
    assert set(delta.sites) <= {site.name for site in sites}
    assert delta.sites
    for site in sites:
        change = delta.sites.get(site.name)
        base = model.get_submodule(site.name)
        theirs = adapted.get_base_model().get_submodule(site.name)
        x = _inputs(site)
        arguments = dict(tuner_arguments or {}) if isinstance(theirs, BaseTunerLayer) else {}
        with torch.no_grad():
            expected, untouched = theirs(x, **arguments), base(x)
            got = untouched if change is None else changed_module(base, change, site.kind)(x)
        got = got[..., : expected.shape[-1]]
        torch.testing.assert_close(
            got, expected, rtol=1e-5, atol=2e-5 * float(expected.abs().amax()), msg=lambda text, s=site: f"{s}: {text}"
        )
        if change is not None:
            distance = (expected[..., : untouched.shape[-1]] - untouched).abs().amax()
            assert distance > 1e-3, f"{site.name}: PEFT's own module changes nothing"


def check_kind(
    model: PreTrainedModel, path: Path, config: peft.PeftConfig, tuner_arguments: Mapping[str, object] | None = None
) -> AdapterDelta:
    """Save, load and hold a random adapter of ``config`` against PEFT; returns it lowered."""
    adapted = save_adapter(model, path, config)
    delta = load(path, view_of(model))
    check_sites(model, adapted, delta, tuner_arguments)
    return delta


def check_logits(model: PreTrainedModel, adapted: peft.PeftModel, delta: AdapterDelta) -> None:
    """All changes merged into a copy of ``model`` give the logits that ``adapted`` gives."""
    dense = copy.deepcopy(model)
    kinds = {site.name: site.kind for site in sites_of(model)}
    for name, change in delta.sites.items():
        parent, _, last = name.rpartition(".")
        setattr(dense.get_submodule(parent), last, changed_module(model.get_submodule(name), change, kinds[name]))
    token_ids = torch.arange(ROWS * 4).view(2, -1) % model.config.vocab_size
    with torch.no_grad():
        expected, got, untouched = (each(token_ids).logits for each in (adapted, dense, model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().amax()))
    assert (expected - untouched).abs().amax() > 1e-3, "PEFT's own model is the base"


def changed_module(base: torch.nn.Module, change: SiteDelta, kind: SiteKind) -> torch.nn.Module:
    """The base's module with the change merged into its weight and bias."""
    module = copy.deepcopy(base)
    weight, bias = base.weight.detach(), getattr(base, "bias", None)
    if kind is SiteKind.EMBEDDING:  # its rows are tokens, but its low-rank part is [hidden, vocab]
        weight, _ = SiteDelta(rows=change.rows).merged(weight, None)
        flat, bias = replace(change, rows=None).merged(weight.T, None)
        weight = flat.T if bias is None else flat.T + bias
    else:
        weight, bias = change.merged(weight, None if bias is None else bias.detach())
        if bias is not None:
            module.bias = torch.nn.Parameter(bias)
    module.weight = torch.nn.Parameter(weight)
    return module


def _inputs(site: Site) -> torch.Tensor:
    if site.kind is SiteKind.EMBEDDING:
        return torch.arange(site.in_features).unsqueeze(0)
    return torch.randn(1, ROWS, site.in_features, generator=torch.Generator().manual_seed(len(site.name)))
