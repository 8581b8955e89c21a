"""An adapter as the device's tables take it: its share of each table, checked and laid out, on the host.

Made beside the engine loop, so that what the loop still has to do is copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loraplex.adapters.delta import AdapterDelta, SiteDelta
from loraplex.errors import InvalidAdapter
from loraplex.models.base import TableRef
from loraplex.types import Coverage
from loraplex_kernels.lora import Factors, LoraTable, Packed, PartDelta, SlotDelta


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """Everything of a loaded adapter that is kept."""

    uid: str
    kind: str
    max_rank: int
    num_parameters: int
    coverage: Coverage
    writes: tuple[tuple[LoraTable, Packed], ...]

    @property
    def nbytes(self) -> int:
        """What it takes of the host and, in a slot, of the adapter memory: its factors, and what a layout rounds up."""
        return sum(packed.nbytes for _, packed in self.writes)


def pack_adapter(delta: AdapterDelta, tables: Mapping[str, TableRef]) -> PackedAdapter:
    """Lay out ``delta`` for the tables of its sites. Touches no table's content: any thread may call it.

    Raises InvalidAdapter naming the sites of a table that cannot take its share: values that are not finite in the
    table's dtype, or shapes that do not fit.
    """
    by_table: dict[int, tuple[LoraTable, dict[int, str]]] = {}  # id -> table, part -> site
    for site in delta.sites:
        ref = tables[site]
        by_table.setdefault(id(ref.table), (ref.table, {}))[1][ref.part] = site
    return PackedAdapter(
        uid=delta.uid,
        kind=delta.kind,
        max_rank=delta.max_rank,
        num_parameters=delta.num_parameters,
        coverage=delta.coverage,
        writes=tuple((table, _pack(table, sites, delta)) for table, sites in by_table.values()),
    )


def _pack(table: LoraTable, sites: Mapping[int, str], delta: AdapterDelta) -> Packed:
    """All parts of one table at once, so that one write brings them."""
    parts = [sites.get(part) for part in range(len(table.part_sizes))]
    share = SlotDelta(tuple(None if site is None else _part(delta.sites[site]) for site in parts))
    try:
        return table.pack(share)
    except ValueError as error:
        named = ", ".join(f"{site!r} (part {part})" for part, site in sorted(sites.items()))
        raise InvalidAdapter(f"adapter {delta.uid}: {named}: {error}") from error


def _part(delta: SiteDelta) -> PartDelta:
    return PartDelta(Factors(delta.a, delta.scaled_b()))
