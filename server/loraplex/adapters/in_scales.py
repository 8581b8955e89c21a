"""One input scale for each packed layer: where its parts need different ones, they get weights of their own.

A packed layer (q, k, v) reads its input once, so its table scales it for all parts alike. An adapter that scales the
input of one part, or of each its own way (IA3 with ``up_proj`` alone among its feed-forward modules), is served by the
product that comes to the same: the matrix with its columns scaled, ``W (i * x) = (W * i) x``, as rows of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.errors import OverCapacity, UnsupportedFeature
from loraplex.layers.rows import Rows
from loraplex.models.base import TableRef

_EXCLUSIVE: Final = "an input scale for one part of a packed layer"


def one_in_scale(
    sites: Mapping[str, SiteDelta],
    tables: Mapping[str, TableRef],
    base: BaseView | None,
    max_bytes: int | None = None,
) -> dict[str, SiteDelta]:
    """``sites`` with at most one input scale a table, shared by all its parts; the others have rows instead, which are
    no term of a sum.

    Raises UnsupportedFeature: some parts differ, and there is no ``base`` to ask for their weights. OverCapacity: those
    rows take more than ``max_bytes``, asked before any is made.
    """
    apart = _apart(sites, tables)
    if base is not None and max_bytes is not None:
        _check_room(apart, base, max_bytes)
    return {site: _with_scaled_rows(site, delta, base) if site in apart else delta for site, delta in sites.items()}


def _apart(sites: Mapping[str, SiteDelta], tables: Mapping[str, TableRef]) -> set[str]:
    """The sites whose input scale not all of their table shares."""
    found: set[str] = set()
    names: dict[int, list[str]] = {}
    for site in sites:
        names.setdefault(id(tables[site].table), []).append(site)
    for together in names.values():
        table = tables[together[0]].table
        scales = [sites[site].in_scale for site in together]
        if table is None or all(scale is None for scale in scales):
            continue
        if len(together) == len(table.part_sizes) and _are_equal(scales):
            continue
        found.update(site for site in together if sites[site].in_scale is not None)
    return found


def _check_room(apart: Collection[str], base: BaseView, max_bytes: int) -> None:
    elements = sum(site.in_features * site.out_features for site in base.sites if site.name in apart)
    if (nbytes := elements * base.dtype.itemsize) > max_bytes:
        raise OverCapacity(
            f"input scales of {len(apart)} sites differ within packed layers, which takes weights of their own of "
            f"{nbytes} bytes; at most {max_bytes} are allowed (max_adapter_bytes)"
        )


def _are_equal(scales: Sequence[torch.Tensor | None]) -> bool:
    first = scales[0]
    return first is not None and all(scale is not None and torch.equal(scale, first) for scale in scales)


def _with_scaled_rows(site: str, delta: SiteDelta, base: BaseView | None) -> SiteDelta:
    """The same function without an input scale."""
    in_scale, low_rank = delta.in_scale, delta.low_rank
    if base is None or in_scale is None:
        raise UnsupportedFeature(f"{site!r}: an input scale that other parts of its packed layer do not share")
    weight, bias = SiteDelta(rows=delta.rows).merged(base.weight(site), base.bias(site))
    rows = Rows((weight * in_scale).to(base.dtype), None, None if bias is None else bias.to(base.dtype))
    if low_rank is not None:
        low_rank = LowRank((low_rank.a.float() * in_scale).to(low_rank.a.dtype), low_rank.b, low_rank.scale)
    exclusive = delta.exclusive or _EXCLUSIVE
    return replace(delta, low_rank=low_rank, in_scale=None, rows=rows, exclusive=exclusive)
