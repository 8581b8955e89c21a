"""Adapters in parts: each rank keeps its own, and they come to and go from their slots together.

The first rank lowers an adapter once and cuts it; the others are sent what is theirs, lay it out and keep it under a
number. Writing the first rank's part into a slot, piece by piece, has them write theirs at the same place in the order
of steps, so that the bank knows nothing of ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from loraplex.adapters.base_view import BaseView, view_of
from loraplex.adapters.cut import cut
from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.adapters.folding import check_foldable, fold_sites, folded_facts
from loraplex.adapters.in_scales import one_in_scale
from loraplex.adapters.norms import as_matrix, squared_row_norms
from loraplex.adapters.packed import (
    PackedAdapter,
    SlotTable,
    Write,
    check_any,
    facts_of,
    footprint_of,
    pack_sites,
)
from loraplex.engine.ranks.orders import (
    AskBias,
    AskSquares,
    AskWeight,
    ClearShare,
    KeepShare,
    Kept,
    Order,
    Question,
    Reply,
    Tensor,
    WriteShare,
)
from loraplex.engine.ranks.wire import DeltaWire, TensorWire
from loraplex.models.base import BaseModel
from loraplex.models.sites import Site, SiteKind
from loraplex.parallel.runs import put_, take
from loraplex.parallel.shard import Shard
from loraplex_kernels.lora import Packed
from loraplex_kernels.lora.slots import SlotBook

Ask = Callable[[Iterable[tuple[int, Question]]], list[Reply]]
"""Asks each of these ranks its question, and returns what they answer, in this order: all are at it at once, from when
their question is made. Raises what the first of them refuses with, and GroupLost."""


@dataclass(frozen=True, slots=True)
class Speech:
    """What is said to the other ranks of a group of ``size``. ``tell`` belongs to the engine loop, which writes slots;
    ``ask`` to the loader's thread; ``forget`` says that a share is of no use any more, and is anybody's."""

    size: int
    ask: Ask
    tell: Callable[[Order], None]
    forget: Callable[[int], None]


class SlotMark:
    """A table that only says that a slot is taken: a rank may have nothing of an adapter that others have."""

    def __init__(self, book: SlotBook) -> None:
        self._book = book
        self._marked: set[int] = set()

    def write(self, slot: int, packed: Packed) -> None:
        if slot not in self._marked:
            self._marked.add(slot)
            self._book.filled(slot)

    def clear(self, slot: int) -> None:
        if slot in self._marked:
            self._marked.remove(slot)
            self._book.emptied(slot)


class NoBytes:
    """What a mark writes."""

    nbytes = 0


def with_mark(writes: Sequence[Write], mark: SlotMark) -> tuple[Write, ...]:
    """A share as it is kept: never without a write."""
    return (Write(mark, NoBytes()), *writes)


class RankedTable:
    """One write of a share, done by all ranks."""

    def __init__(self, table: SlotTable, tell: Callable[[Order], None], share: int, done: int, total: int) -> None:
        """It is write number ``done`` of ``total``."""
        self._table = table
        self._tell = tell
        self._share = share
        self._done = done
        self._total = total

    def write(self, slot: int, packed: Packed) -> None:
        self._tell(WriteShare(self._share, slot, self._done, self._total))
        self._table.write(slot, packed)

    def clear(self, slot: int) -> None:
        if self._done == 0:  # all of a share goes at once
            self._tell(ClearShare(self._share, slot))
        self._table.clear(slot)


class SharingPacker:
    """Lays adapters out over the ranks of a group (``others.Packer``)."""

    def __init__(self, model: BaseModel, max_bytes: int, mark: SlotMark, speech: Speech) -> None:
        self.base = GatheredBase(model, speech.size, speech.ask).view()
        self._here = view_of(model)
        self._tables = model.tables()
        self._sites = self.base.by_name()
        self._max_bytes = max_bytes
        self._mark = mark
        self._speech = speech
        self._numbers = itertools.count(1)

    def __call__(self, delta: AdapterDelta, give_way: Callable[[], None]) -> PackedAdapter:
        check_any(delta)
        delta = replace(delta, sites=one_in_scale(delta.sites, self._tables, self.base, self._max_bytes))
        return self._kept(delta, pack_sites(delta.uid, self._part(delta, 0), self._tables, give_way), folded=False)

    def fold(self, delta: AdapterDelta, room_bytes: int, give_way: Callable[[], None]) -> PackedAdapter:
        check_foldable(delta, self._tables, room_bytes)
        writes = fold_sites(delta.uid, self._part(delta, 0), delta.sites, self._tables, self._here, give_way)
        return self._kept(delta, writes, folded=True)

    def _kept(self, delta: AdapterDelta, laid_out: Sequence[Write], *, folded: bool) -> PackedAdapter:
        """Have the other ranks keep their parts beside this one's."""
        speech, share = self._speech, next(self._numbers)
        writes = with_mark(laid_out, self._mark)
        try:
            replies = speech.ask((rank, self._share(share, delta, rank, folded)) for rank in range(1, speech.size))
        except BaseException:
            speech.forget(share)
            raise
        largest = max(reply.nbytes for reply in replies if isinstance(reply, Kept))
        here = footprint_of(writes).nbytes
        ranked = tuple(
            replace(write, table=RankedTable(write.table, speech.tell, share, index, len(writes)))
            for index, write in enumerate(writes)
        )
        facts = (folded_facts if folded else facts_of)(delta, max(here, largest))
        return PackedAdapter(facts, ranked, beyond=max(largest - here, 0), discard=partial(speech.forget, share))

    def _share(self, share: int, delta: AdapterDelta, rank: int, folded: bool) -> KeepShare:
        part = self._part(delta, rank)
        deltas = tuple(DeltaWire.of(site, change) for site, change in part.items())
        return KeepShare(share, delta.uid, deltas, tuple(delta.sites) if folded else ())

    def _part(self, delta: AdapterDelta, rank: int) -> dict[str, SiteDelta]:
        return cut(delta.sites, self._sites, rank, self._speech.size)


class GatheredBase:
    """The whole base model, of which every rank holds a part; each asks the others for what it is asked."""

    def __init__(self, model: BaseModel, size: int, ask: Ask) -> None:
        self._here = view_of(model)
        self._sites = self._here.by_name()
        self._size = size
        self._ask = ask

    def view(self) -> BaseView:
        return replace(self._here, weight=self.weight, bias=self.bias, norms=self.norms)

    def weight(self, name: str) -> torch.Tensor:
        site, here = self._sites[name], self._here.weight(name)
        if site.cut.shard is Shard.REPLICATED:
            return here
        whole = here.new_empty(site.weight_shape)
        for rank, held in enumerate((here, *self._asked([AskWeight(name)] * (self._size - 1)))):
            part = site.part(rank, self._size)
            if part.shard is Shard.COLUMN:
                put_(whole, part.rows, held)
            else:
                whole[(part.cols,) if site.kind is SiteKind.EMBEDDING else (slice(None), part.cols)] = held
        return whole

    def bias(self, name: str) -> torch.Tensor | None:
        site, here = self._sites[name], self._here.bias(name)
        if here is None or site.cut.shard is not Shard.COLUMN:  # what is added once is the first rank's
            return here
        whole = here.new_empty(site.out_features)
        for rank, held in enumerate((here, *self._asked([AskBias(name)] * (self._size - 1)))):
            put_(whole, site.part(rank, self._size).rows, held)
        return whole

    def norms(self, site: Site, change: LowRank) -> torch.Tensor:
        """Every rank squares its own part; of one that all have, the first."""
        ranks = 1 if site.cut.shard is Shard.REPLICATED else self._size
        parts = [site.part(rank, self._size) for rank in range(ranks)]
        mine, *theirs = (LowRank(change.a[:, part.cols], take(change.b, part.rows), change.scale) for part in parts)
        here = squared_row_norms(as_matrix(self._here.weight(site.name), site), mine)
        asked = [AskSquares(site.name, TensorWire.of(one.a), TensorWire.of(one.b), one.scale) for one in theirs]
        squares = torch.zeros(site.out_features, dtype=torch.float64)
        for part, found in zip(parts, (here, *self._asked(asked)), strict=True):
            if part.shard is Shard.ROW:
                squares += found
            else:
                put_(squares, part.rows, found)
        return squares.sqrt().float()

    def _asked(self, questions: Sequence[Question]) -> Iterator[torch.Tensor]:
        """What the other ranks answer, in rank order."""
        for rank, reply in enumerate(self._ask(enumerate(questions, start=1)), start=1):
            assert isinstance(reply, Tensor)
            assert reply.wire is not None, f"rank {rank} has nothing of what it is asked for"
            yield reply.wire.tensor()
