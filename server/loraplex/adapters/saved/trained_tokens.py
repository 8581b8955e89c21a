"""Rows of an embedding or a head that an adapter was trained with, token by token.

Sources: peft 0.21 tuners/trainable_tokens (peft_type TRAINABLE_TOKENS, key ``token_indices``) and utils/other.py
``set_additional_trainable_modules`` (key ``trainable_token_indices`` of other kinds): both replace rows, and both give
a tied head the embedding's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import ConfigReader
from loraplex.adapters.reading.targets import TargetRule, Targets
from loraplex.adapters.reading.tensors import TensorBag
from loraplex.errors import InvalidAdapter, Mismatch, UnsupportedFeature
from loraplex.layers.rows import Rows
from loraplex.models.sites import Site, SiteKind

#: the key of the kinds that have it beside their own tensors, and that of the kind that is nothing else
BESIDE: Final = "trainable_token_indices"
ALONE: Final = "token_indices"
_SUFFIXES: Final = {
    BESIDE: ".token_adapter.trainable_tokens_delta",
    ALONE: ".trainable_tokens_delta",
}


@dataclass(frozen=True, slots=True)
class TrainedTokens:
    """Site -> its trained rows, by rising token id. ``key``: of the config; ``tied``: the head's name, where it
    follows the embedding."""

    key: str
    rows: Mapping[str, Rows]
    tied: str = ""


@dataclass(frozen=True, slots=True)
class _Plan:
    key: str
    tokens: dict[str, tuple[int, ...]]
    tied: str = ""


def read_trained_tokens(files: AdapterFiles, base: BaseView) -> TrainedTokens:
    """Take the trained rows out of the bag. Ids may lie past the base's vocabulary.

    Raises:
        InvalidAdapter: ids that are none or twice there, missing tensors, tied rows that differ.
        Mismatch: a shape that does not fit.
        UnsupportedFeature: a module whose rows PEFT cannot train so, by name.
    """
    config = files.config
    plan = _alone(config, base) if ALONE in config.values else _beside(config, base)
    sites, bag = base.by_name(), files.tensors
    rows = {name: _take(sites[name], tokens, _SUFFIXES[plan.key], files) for name, tokens in plan.tokens.items()}
    if plan.tied:
        source = next(name for name in rows if sites[name].kind is SiteKind.EMBEDDING)
        again = bag.get(plan.tied + _SUFFIXES[plan.key])
        if again is not None:
            repeated = _take(sites[plan.tied], plan.tokens[source], _SUFFIXES[plan.key], files)
            if not torch.equal(repeated.values, rows[source].values):
                raise InvalidAdapter(f"{bag.where}: the trained tokens of the tied {source!r} and {plan.tied!r} differ")
        rows[plan.tied] = rows[source]
    return TrainedTokens(plan.key, rows, plan.tied)


def _alone(config: AdapterConfig, base: BaseView) -> _Plan:
    """peft 0.21 tuners/trainable_tokens/model.py ``inject_adapter``."""
    found = ConfigReader(config)
    tokens = _tokens(found, ALONE, config.values.get(ALONE))
    embedding, head = _ends(base)
    names = found.names_or_pattern("target_modules") or (embedding.name,)
    targets = Targets(TargetRule(names, (), (), (), config.where))
    chosen = targets.select(base.of(SiteKind.LINEAR, SiteKind.EMBEDDING))
    if not chosen:
        raise Mismatch(
            f"{config.where}: target_modules {names!r:.100} matches none of the model's sites; the model has "
            f"{base.modules()}",
            field="target_modules",
        )
    tied = head.name if base.tied and embedding.name in chosen else ""
    if tied in chosen:
        raise UnsupportedFeature(
            f"{config.where}: target_modules names both {embedding.name!r} and the head tied to it, which PEFT cannot "
            f"run; name the embedding alone",
            field="target_modules",
        )
    return _Plan(ALONE, {site.name: tokens for site in _ordered(chosen, base, config, "target_modules")}, tied)


def _beside(config: AdapterConfig, base: BaseView) -> _Plan:
    """peft 0.21 utils/other.py ``set_additional_trainable_modules``."""
    found, value = ConfigReader(config), config.values.get(BESIDE)
    if value is None or value == {}:
        return _Plan(BESIDE, {})
    embedding, head = _ends(base)
    entries = value if isinstance(value, dict) else {embedding.name: value}
    wanted = {name: _tokens(found, f"{BESIDE}[{name!r:.100}]", ids) for name, ids in entries.items()}
    ends = [name for name in wanted if embedding.name.endswith(name) or head.name.endswith(name)]
    differ = base.tied and len({wanted[name] for name in ends}) > 1
    if differ and config.flag("ensure_weight_tying"):
        raise InvalidAdapter(
            f"{config.where}: {BESIDE} gives the tied {embedding.name!r} and {head.name!r} other tokens, though "
            f"ensure_weight_tying is set",
            field=BESIDE,
        )
    tokens: dict[str, tuple[int, ...]] = {}
    for name, ids in wanted.items():
        chosen = {site.name for site in base.sites if site.name.endswith(name) and site.kind is not SiteKind.VECTOR}
        for site in _ordered(chosen, base, config, BESIDE):
            if site.name in tokens:
                raise InvalidAdapter(f"{config.where}: {BESIDE} names {site.name!r} twice", field=BESIDE)
            tokens[site.name] = ids
        if not chosen:
            raise Mismatch(
                f"{config.where}: {BESIDE} names {name!r:.100}; the model has {base.modules()}", field=BESIDE
            )
    if base.tied and embedding.name in tokens and not differ:
        if head.name in tokens and head.name not in wanted:
            raise UnsupportedFeature(
                f"{config.where}: {BESIDE} names the head, which is tied, by a part of its name; write {head.name!r}",
                field=BESIDE,
            )
        tokens.pop(head.name, None)
        return _Plan(BESIDE, tokens, head.name)
    return _Plan(BESIDE, tokens)


def _tokens(found: ConfigReader, key: str, value: object) -> tuple[int, ...]:
    tokens = found.token_ids(key, value)
    if len(set(tokens)) < len(tokens):
        raise found.wrong(key, value, "token ids none of which is there twice")
    return tokens


def _ends(base: BaseView) -> tuple[Site, Site]:
    """The embedding and the head."""
    embedding = base.of(SiteKind.EMBEDDING)[0]
    return embedding, next(site for site in base.sites if site.is_head)


def _ordered(chosen: set[str], base: BaseView, config: AdapterConfig, key: str) -> list[Site]:
    """The chosen sites, if rows of theirs can be trained: PEFT's layer knows two sorts, and leaves a bias out."""
    found = [site for site in base.sites if site.name in chosen]
    for site in found:
        if not site.has_matrix or site.bias:
            raise UnsupportedFeature(
                f"{config.where}: {key} names {site.name!r}; only rows of embeddings and of linear modules without a "
                f"bias can be trained",
                field=key,
            )
    return found


def _take(site: Site, tokens: tuple[int, ...], suffix: str, files: AdapterFiles) -> Rows:
    bag: TensorBag = files.tensors
    name = site.name + suffix
    values = bag.take(name)
    if values is None:
        raise InvalidAdapter(f"{bag.where}: tensor {name!r} is missing: the rows of {len(tokens)} trained tokens")
    is_embedding = site.kind is SiteKind.EMBEDDING
    expected = (len(tokens), site.out_features if is_embedding else site.in_features)
    if tuple(values.shape) != expected:
        raise Mismatch(
            f"{bag.where}: {name!r} has shape {list(values.shape)}, expected {list(expected)}: one row for each token"
        )
    indices, order = torch.tensor(tokens, dtype=torch.int64).sort()
    return Rows(values[order], indices)
