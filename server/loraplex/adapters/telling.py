"""Tokens by which an adapter shows: those whose own embedding it changes, for a prompt that tries it out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Final

import torch

from loraplex.adapters.delta import SiteDelta
from loraplex.models.sites import Site, SiteKind

#: tokens at most
MAX_TELLING: Final = 8


def telling_tokens(sites: Mapping[str, SiteDelta], base: Iterable[Site]) -> tuple[int, ...]:
    """Up to ``MAX_TELLING`` ids, rising. Empty: the adapter leaves the embedding alone, or changes all of it alike.

    An embedding's low-rank part often changes only the tokens that it was trained with (PEFT begins with an A of
    zeros, ``LoraLayer.reset_lora_parameters``); a prompt without any of them would not show it at all.
    """
    found: list[int] = []
    for site in base:
        delta = sites.get(site.name)
        if site.kind is SiteKind.EMBEDDING and delta is not None:
            found += [*_with_rows(delta, site.in_features), *_with_factors(delta)]
    return tuple(sorted(islice(dict.fromkeys(found), MAX_TELLING)))


def _with_rows(delta: SiteDelta, vocab_size: int) -> list[int]:
    """Tokens that have a row of their own, or those that the base does not know; evenly out of many."""
    if delta.rows is None:
        return []
    indices = delta.rows.indices
    if indices is None:
        indices = torch.arange(vocab_size, max(len(delta.rows.values), vocab_size))
    if not len(indices):
        return []
    places = torch.linspace(0, len(indices) - 1, min(MAX_TELLING, len(indices))).long()
    tokens: list[int] = indices[places].tolist()
    return tokens


def _with_factors(delta: SiteDelta) -> list[int]:
    """Tokens whose columns of A are largest."""
    if delta.low_rank is None:
        return []
    sizes = delta.low_rank.a.float().norm(dim=0)  # [vocab]
    best = sizes.topk(min(MAX_TELLING, len(sizes)))
    return [token for token, size in zip(best.indices.tolist(), best.values.tolist(), strict=True) if size > 0]
