"""An adapter as the device's tables take it: its share of each table, checked and laid out, on the host.

Made beside the engine loop, so that what the loop still has to do is copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, SiteDelta
from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.in_scales import one_in_scale
from loraplex.adapters.ledger import Footprint
from loraplex.errors import InvalidAdapter
from loraplex.models.base import TableRef
from loraplex_kernels.lora import Factors, LoraTable, Packed, PartDelta, SlotDelta


def _nothing() -> None:
    return None


class SlotTable(Protocol):
    """What both a ``LoraTable`` and a ``RowsTable`` are to whoever fills their slots."""

    def write(self, slot: int, packed: Packed) -> None: ...
    def clear(self, slot: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Write:
    """One table's share of an adapter. ``key``: writes of equal keys are the same bytes in one memory, whichever
    adapter they belong to; empty: nobody else's."""

    table: SlotTable
    packed: Packed
    key: str = ""

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """Everything of a loaded adapter that is kept. ``text_file``: its own text, as long as its load is in progress
    (``TextSpool.write``). ``beyond``: bytes that some other rank takes more than this one. ``discard``: called by
    whoever keeps it when nobody will use it any more."""

    facts: AdapterFacts
    writes: tuple[Write, ...]
    text_file: Path | None = None
    beyond: int = 0
    discard: Callable[[], None] = _nothing

    @property
    def uid(self) -> str:
        return self.facts.uid

    @property
    def footprint(self) -> Footprint:
        """What it takes of the host and, in a slot, of the adapter memory."""
        here = footprint_of(self.writes)
        return replace(here, own=here.own + self.beyond)


def pack_adapter(
    delta: AdapterDelta,
    tables: Mapping[str, TableRef],
    base: BaseView | None = None,
    *,
    max_bytes: int | None = None,
    give_way: Callable[[], None] = lambda: None,
) -> PackedAdapter:
    """Lay out ``delta`` for the tables of its sites. Touches no table's content: one thread beside the engine's may
    call it.

    ``base`` is asked for weights where parts of a packed layer scale their inputs differently (``in_scales``), of at
    most ``max_bytes``. ``give_way`` is called between two tables.

    Raises as ``pack_sites`` and ``check_any`` do; UnsupportedFeature, OverCapacity as ``one_in_scale`` does.
    """
    check_any(delta)
    delta = replace(delta, sites=one_in_scale(delta.sites, tables, base, max_bytes))
    writes = pack_sites(delta.uid, delta.sites, tables, give_way)
    return PackedAdapter(facts_of(delta, footprint_of(writes).nbytes), writes)


def check_any(delta: AdapterDelta) -> None:
    """Raises InvalidAdapter: there is nothing to load. Not even one that says it is an identity may be so: its slot
    would be held by nothing."""
    if not delta.sites:
        raise InvalidAdapter(f"adapter {delta.uid}: nothing of it differs from the base: there is nothing to load")


def pack_sites(
    uid: str,
    sites: Mapping[str, SiteDelta],
    tables: Mapping[str, TableRef],
    give_way: Callable[[], None] = lambda: None,
) -> tuple[Write, ...]:
    """Lay out ``sites``, at most one input scale a table among them. Touches no table's content. ``give_way`` is called
    between two tables.

    Raises InvalidAdapter naming the sites of a table that cannot take its share: values that are not finite in the
    table's dtype, or shapes that do not fit.
    """
    by_table: dict[int, tuple[LoraTable, dict[int, str]]] = {}  # id -> table, part -> site
    writes: list[Write] = []
    for site, change in sites.items():
        ref = tables[site]
        if change.rows is not None:
            try:
                packed = ref.rows.pack(change.rows)
            except ValueError as error:
                raise InvalidAdapter(f"adapter {uid}: {site!r}: {error}") from error
            writes.append(Write(ref.rows, packed, packed.key))
        if ref.table is not None and _is_part(change):
            by_table.setdefault(id(ref.table), (ref.table, {}))[1][ref.part] = site
    for table, parts in by_table.values():
        writes.append(Write(table, _pack(table, parts, sites, uid)))
        give_way()
    return tuple(writes)


def facts_of(delta: AdapterDelta, nbytes: int | None = None) -> AdapterFacts:
    """What is known of a lowered adapter; ``nbytes``: of its layout, else those of its tensors."""
    return AdapterFacts(
        uid=delta.uid,
        kind=delta.kind,
        max_rank=delta.max_rank,
        num_parameters=delta.num_parameters,
        nbytes=delta.nbytes if nbytes is None else nbytes,
        coverage=delta.coverage,
        vocab_size=delta.vocab_size,
        invocation_tokens=delta.invocation_tokens,
        exclusive=delta.exclusive,
        identity=delta.identity,
        telling_tokens=delta.telling_tokens,
        own_rows=any(site.rows is not None for site in delta.sites.values()),
        text=None if delta.text is None else delta.text.facts,
        template_unused=delta.template_unused,
        invocation_text=delta.invocation_text,
    )


def _pack(table: LoraTable, names: Mapping[int, str], sites: Mapping[str, SiteDelta], uid: str) -> Packed:
    """All parts of one table at once, so that one write brings them. ``names``: part -> site."""
    changes = [sites[names[part]] if part in names else None for part in range(len(table.part_sizes))]
    parts = tuple(None if change is None else _part(change) for change in changes)
    share = SlotDelta(parts, next((sites[name].in_scale for name in names.values()), None))
    try:
        return table.pack(share)
    except ValueError as error:
        named = ", ".join(f"{site!r} (part {part})" for part, site in sorted(names.items()))
        raise InvalidAdapter(f"adapter {uid}: {named}: {error}") from error


def _part(delta: SiteDelta) -> PartDelta:
    factors = delta.factors()
    return PartDelta(None if factors is None else Factors(*factors), delta.out_scale, delta.shift)


def footprint_of(writes: Iterable[Write]) -> Footprint:
    """Bytes of all the writes of one adapter."""
    return Footprint.of((write.key, write.nbytes) for write in writes)


def _is_part(delta: SiteDelta) -> bool:
    """Whether a low-rank table has anything to keep of it."""
    return any(part is not None for part in (delta.low_rank, delta.out_scale, delta.in_scale, delta.shift))
