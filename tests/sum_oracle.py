"""Sums of adapters as PEFT makes them, in every way that it has of making one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftMixedModel
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.oracle import Alone, fresh, on_every_module, with_adapters

#: adapter directories and their weights; PEFT knows them as ``part0``, ``part1`` and so on, in this order
Parts = Sequence[tuple[Path, float]]


def combined(base_dir: Path, parts: Parts, combination_type: str) -> Alone:
    """PEFT's ``add_weighted_adapter`` of LoRAs."""
    model, weights = _with(base_dir, parts)
    with on_every_module():
        model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type=combination_type)
    model.set_adapter("sum")
    return Alone(model)


def combined_ia3(base_dir: Path, parts: Parts) -> Alone:
    """PEFT's ``add_weighted_adapter`` of IA3s: their vectors' weighted sum."""
    model, weights = _with(base_dir, parts)
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    model.set_adapter("sum")
    return Alone(model)


def active_together(base_dir: Path, parts: Parts) -> Alone:
    """Several active adapters of PEFT's LoRA model, in the order given, each weighted by its scaling."""
    model, weights = _with(base_dir, parts)
    model.base_model.set_adapter(list(weights))
    _weigh(model, weights)
    return Alone(model)


def active_mixed(base_dir: Path, parts: Parts) -> Alone:
    """Several active adapters of PEFT's mixed model, which is of several kinds at once."""
    paths, weights = _named(parts)
    (first, path), *others = paths.items()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        model: Any = PeftMixedModel.from_pretrained(fresh(base_dir), str(path), first)
        for name, path in others:
            model.load_adapter(str(path), name)
    model.set_adapter(list(weights))
    _weigh(model, weights)
    return Alone(model)


@torch.no_grad()
def merged_changes(base_dir: Path, parts: Parts) -> Alone:
    """The base plus the weighted change that each adapter makes to it when PEFT merges that one alone."""
    model = fresh(base_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path, weight in parts:
        one = with_adapters(fresh(base_dir), {"default": path}).merge_and_unload().state_dict()
        for name, tensor in model.state_dict().items():
            tensor += weight * (one[name] - before[name])
    return Alone(model)


def merged_in_turn(base_dir: Path, adapters: Sequence[Path]) -> Alone:
    """Each adapter merged by PEFT into what the one before has left."""
    model = fresh(base_dir)
    for path in adapters:
        model = with_adapters(model, {"default": path}).merge_and_unload()
    return Alone(model)


def _named(parts: Parts) -> tuple[dict[str, Path], dict[str, float]]:
    """PEFT's names for the parts, which say nothing of a kind: it would mistake some for its own prefixes."""
    names = [f"part{index}" for index in range(len(parts))]
    paths = {name: path for name, (path, _) in zip(names, parts, strict=True)}
    return paths, {name: weight for name, (_, weight) in zip(names, parts, strict=True)}


def _with(base_dir: Path, parts: Parts) -> tuple[Any, dict[str, float]]:
    paths, weights = _named(parts)
    return with_adapters(fresh(base_dir), paths).eval(), weights


def _weigh(model: Any, weights: Mapping[str, float]) -> None:
    """Multiply every layer's scaling of these adapters. (PEFT's own ``set_scale`` forgets that an rsLoRA is one.)"""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            scaling = getattr(layer, "scaling", {})
            for name, weight in weights.items():
                if name in scaling:
                    scaling[name] *= weight
