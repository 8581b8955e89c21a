"""An adapter folded into the base's matrices: the form in which it is served with no work beside the base's.

Every linear layer that it touches has a matrix of its own, whole: of each part ``SiteDelta.merged``, in float32 and
rounded once to the base's dtype, and the base's own where it touches only others. Biases go with it; where the base has
none and the adapter shifts, the matrix has one of its own. The head is folded by itself, its shift stays in its table.
What is looked up, normed or convolved stays as it was: that is no work to speak of. Of several ranks each folds its
own part of the adapter into its own part of the base, so nothing dense ever crosses; into the same layers on all of
them, also where its part is zero: what a step launches must not hang on what a rank has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, SiteDelta
from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.packed import Write, facts_of, pack_sites
from loraplex.errors import InvalidAdapter, OverCapacity, UnsupportedFeature
from loraplex.layers.rows import Rows
from loraplex.layers.rows_table import RowsTable
from loraplex.models.base import TableRef

#: behind the uid of an adapter in that of its folded form: pages of the one are not those of the other
_SUFFIX: Final = "+merged"


@dataclass(frozen=True, slots=True)
class _Layer:
    """A packed layer of this rank: its sites, in the order of their outputs."""

    table: RowsTable
    sites: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Of its matrix, before it is laid out."""
        site = self.table.site
        return site.num_rows * site.width * site.dtype.itemsize


def folded_uid(uid: str) -> str:
    """What the folded form of an adapter goes by."""
    return uid + _SUFFIX


def folded_facts(delta: AdapterDelta, nbytes: int) -> AdapterFacts:
    """Of the folded form of ``delta``, which takes ``nbytes``."""
    return replace(facts_of(delta, nbytes), uid=folded_uid(delta.uid), own_rows=True)


def check_foldable(delta: AdapterDelta, tables: Mapping[str, TableRef], room_bytes: int) -> None:
    """Whether ``delta``, of this rank, can be folded within ``room_bytes``; asked before any matrix is made.

    Raises:
        UnsupportedFeature: it begins at a place of the prompt, or touches no matrix that is multiplied by.
        OverCapacity: there is no room; in bytes.
    """
    if delta.invocation_tokens:
        raise begins_later(delta.uid)
    needed = sum(layer.nbytes for layer in _touched(delta.sites, tables)) + sum(
        ref.rows.site.num_rows * ref.rows.site.width * ref.rows.site.dtype.itemsize
        for name, ref in tables.items()
        if name in delta.sites and _is_head(ref) and _multiplies(delta.sites[name])
    )
    if not needed:
        raise UnsupportedFeature(
            f"adapter {delta.uid}: nothing that it changes is multiplied by: there is nothing to merge",
            field="resident_mode",
        )
    if needed > room_bytes:
        raise no_room(delta.uid, needed, room_bytes)


def begins_later(adapter: str) -> UnsupportedFeature:
    """What refuses an adapter that is not on from the first token."""
    return UnsupportedFeature(
        f"adapter {adapter}: an activated LoRA begins at a place of the prompt, before which the base answers: it "
        "cannot be merged",
        field="resident_mode",
    )


def no_room(adapter: str, needed: int, room_bytes: int) -> OverCapacity:
    """What refuses a merged form of ``needed`` bytes."""
    return OverCapacity(
        f"adapter {adapter}: merged it takes {needed} bytes of the adapter memory (--adapter-memory), of which "
        f"{max(room_bytes, 0)} are available",
        field="resident_mode",
    )


def fold_sites(
    uid: str,
    sites: Mapping[str, SiteDelta],
    touched: Collection[str],
    tables: Mapping[str, TableRef],
    here: BaseView,
    give_way: Callable[[], None] = lambda: None,
) -> tuple[Write, ...]:
    """Lay out this rank's part ``sites`` of an adapter folded into ``here``, its part of the base. Touches no table's
    content. ``touched``: all that the adapter changes, on whichever rank. ``give_way`` is called between two layers.

    Raises InvalidAdapter as ``pack_sites`` does.
    """
    layers = _touched(touched, tables)
    writes: list[Write] = []
    for layer in layers:
        writes.append(_write(uid, layer, sites, here))
        give_way()
    within = {name for layer in layers for name in layer.sites}
    others = {
        name: _folded_head(delta, here.weight(name)) if _is_head(tables[name]) and _multiplies(delta) else delta
        for name, delta in sites.items()
        if name not in within
    }
    return (*writes, *pack_sites(uid, others, tables))


def _touched(sites: Collection[str], tables: Mapping[str, TableRef]) -> list[_Layer]:
    """The packed layers that have any of ``sites``."""
    found: dict[int, tuple[RowsTable, list[tuple[int, str]]]] = {}
    for name, ref in tables.items():
        if ref.folded is not None:
            found.setdefault(id(ref.folded), (ref.folded, []))[1].append((ref.part, name))
    layers = [_Layer(table, tuple(name for _, name in sorted(names))) for table, names in found.values()]
    return [layer for layer in layers if any(name in sites for name in layer.sites)]


def _write(uid: str, layer: _Layer, sites: Mapping[str, SiteDelta], here: BaseView) -> Write:
    site = layer.table.site
    weight = torch.empty(site.num_rows, site.width, dtype=site.dtype)
    bias: torch.Tensor | None = None
    start = 0
    for merged, own_bias in _parts(layer, sites, here):
        stop = start + len(merged)
        weight[start:stop] = merged
        if own_bias is not None:
            bias = weight.new_zeros(site.num_rows) if bias is None else bias
            bias[start:stop] = own_bias
        start = stop
    assert start == site.num_rows, f"parts of {layer.sites} are {start} rows, the layer has {site.num_rows}"
    try:
        packed = layer.table.pack(Rows(weight, None, bias), key=f"{folded_uid(uid)} {layer.sites[0]}")
    except ValueError as error:
        raise InvalidAdapter(f"adapter {uid}: merged into {', '.join(map(repr, layer.sites))}: {error}") from error
    return Write(layer.table, packed)


def _parts(
    layer: _Layer, sites: Mapping[str, SiteDelta], here: BaseView
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Matrix and bias of each part, one at a time."""
    for name in layer.sites:
        weight, bias = here.weight(name), here.bias(name)
        yield (weight, bias) if name not in sites else sites[name].merged(weight, bias)


def _is_head(ref: TableRef) -> bool:
    return ref.folded is None and ref.table is not None and ref.rows.site.is_multiplied


def _multiplies(delta: SiteDelta) -> bool:
    """Whether it does more than put rows, or add a vector."""
    return any(part is not None for part in (delta.low_rank, delta.out_scale, delta.in_scale))


def _folded_head(delta: SiteDelta, weight: torch.Tensor) -> SiteDelta:
    merged, _ = replace(delta, shift=None).merged(weight, None)
    return SiteDelta(rows=Rows(merged.to(weight.dtype)), shift=delta.shift, exclusive=delta.exclusive)
