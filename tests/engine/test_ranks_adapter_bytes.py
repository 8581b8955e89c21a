"""What each rank keeps of an adapter of every kind: the bytes of ``docs/ARCHITECTURE.md``, counted in storages, so that
a view of a whole tensor is seen."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from loraplex.adapters.cut import cut
from loraplex.adapters.delta import SiteDelta
from loraplex.engine.local import LocalEngine
from loraplex.engine.runner import Runner
from loraplex.layers.embedding import FOREIGN_COLUMNS
from loraplex.layers.rows import PackedRows, Rows
from loraplex.models.base import TableRef
from loraplex.models.sites import ENDS, Site, SiteKind
from loraplex.parallel.shard import Shard
from loraplex.quant.dense import dense_weight
from loraplex_kernels.lora import PartDelta
from loraplex_kernels.lora.reference import ReferenceTable
from tests.engines import local_engine
from tests.held import held_bytes
from tests.kind_matrix import KindMatrix
from tests.kind_modules import MODULES
from tests.peft_kinds import SOME_OF_ALL, WIDE_VOCAB, recipes, recipes_of
from tests.ranks import RankedEngine, ranked_engine
from tests.tiny import VOCAB_SIZE

SIZES = (2, 4)
#: on four ranks two each have the same key/value head, or the same group of B and C
CASES = [
    *(("llama", tied, name) for tied in (False, True) for name in recipes(tied)),
    *(("mamba2", False, name) for name in recipes(False, recipes_of(MODULES["mamba2"])) if name in SOME_OF_ALL),
]
FLOAT_BYTES, INDEX_BYTES = 4, 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What a rank keeps at one site."""

    part: PartDelta | None
    #: of the whole table, named at its first part
    in_scale: torch.Tensor | None
    rows: PackedRows | None


@dataclass(frozen=True, slots=True)
class World:
    """One base over one rank and over several. ``one`` has whole adapters, in this test's eyes the truth."""

    matrix: KindMatrix
    one: LocalEngine
    several: Mapping[int, RankedEngine]

    @property
    def here(self) -> Runner:
        return self.one.core._steps.executor.runner


Worlds = Mapping[tuple[str, bool], World]


@pytest.fixture(scope="module")
def worlds(kinds_root: Path) -> Iterator[Worlds]:
    with ExitStack() as stack:
        bases = dict.fromkeys((base, tied) for base, tied, _ in CASES)
        yield {(base, tied): world(kinds_root, base, tied, stack) for base, tied in bases}


def world(root: Path, base: str, tied: bool, stack: ExitStack) -> World:
    matrix = KindMatrix(root, base, tied=tied)
    make = partial(local_engine, matrix.base_dir, adapter_dirs=(root,), lora_backend="reference")
    ranked = partial(ranked_engine, matrix.base_dir, adapter_dirs=(root,), lora_backend="reference")
    return World(matrix, make(), {size: stack.enter_context(ranked(size)) for size in SIZES})


@contextmanager
def loaded(engine: LocalEngine, matrix: KindMatrix, name: str) -> Iterator[int]:
    """While ``name`` is loaded, and nothing else is; yields the bytes that the server says it takes."""
    yield engine.load_adapter(name, str(matrix.adapter(name))).bytes
    engine.unload_adapter(name)


def kept_by(runner: Runner) -> dict[str, Kept]:
    """Site -> what ``runner``'s rank keeps there, where it keeps anything."""
    found: dict[str, Kept] = {}
    named: set[int] = set()
    for site, ref in runner.model.tables().items():
        kept = Kept(*_low_rank(ref, named), _only(ref.rows.held))
        if any(one is not None for one in (kept.part, kept.in_scale, kept.rows)):
            found[site] = kept
    return found


def _low_rank(ref: TableRef, named: set[int]) -> tuple[PartDelta | None, torch.Tensor | None]:
    if ref.table is None:
        return None, None
    assert isinstance(ref.table, ReferenceTable)
    held = _only(ref.table._slots)
    if held is None:
        return None, None
    in_scale = None if id(ref.table) in named else held.in_scale
    named.add(id(ref.table))
    return held.parts[ref.part], in_scale


def _only(slots: Mapping[int, T]) -> T | None:
    assert len(slots) <= 1
    return next(iter(slots.values()), None)


@dataclass(frozen=True, slots=True)
class Share:
    """The documented part of one site on one rank, in plain arithmetic on the site's sizes."""

    site: Site
    rank: int
    size: int

    def nbytes(self, whole: Kept) -> int:
        """Of ``whole``, all of which one rank alone keeps."""
        part, rows = whole.part or PartDelta(), whole.rows
        vectors = self._outputs if self._by_outputs else self.site.out_features
        numbers = 0
        if part.factors is not None:
            numbers += self.directions(part) * (self._inputs + self._outputs)
        if part.out_scale is not None:
            numbers += vectors
        if part.shift is not None and (self._by_outputs or self._leads):
            numbers += vectors
        if whole.in_scale is not None:
            numbers += self._inputs
        return numbers * FLOAT_BYTES + (0 if rows is None else self._own_rows(rows))

    def directions(self, part: PartDelta) -> int:
        """How many of the low-rank part's are not zero on this rank."""
        assert part.factors is not None
        a, b = part.factors
        if self.site.cut.shard is Shard.REPLICATED:
            return len(a)
        mine = self._mine
        return int((b[mine].any(0) if self._by_outputs else a[:, mine].any(1)).sum())

    @property
    def _by_outputs(self) -> bool:
        return self.site.cut.shard is Shard.COLUMN

    @property
    def _leads(self) -> bool:
        return self.rank == 0 or self.site.cut.shard is Shard.REPLICATED

    @property
    def _outputs(self) -> int:
        return self._width if self._by_outputs else self.site.out_features

    @property
    def _inputs(self) -> int:
        foreign = FOREIGN_COLUMNS if self.site.kind is SiteKind.EMBEDDING else 0
        return self._width + foreign if self.site.cut.shard is Shard.ROW else self.site.in_features

    @property
    def _width(self) -> int:
        """Outputs or inputs of the site that are this rank's."""
        return len(self._mine)

    @property
    def _mine(self) -> torch.Tensor:
        """Which they are: of each stretch, where it has several, one of as many runs as there are ranks, or pieces."""
        features = self.site.out_features if self._by_outputs else self.site.in_features
        stretches = [(one.features, one.pieces) for one in self.site.cut.stretches]
        found, begin = [], 0
        for length, pieces in stretches or [(features, self.site.cut.pieces)]:
            runs = min(self.size, pieces)
            width = length // runs
            start = begin + self.rank * runs // self.size * width
            found.append(torch.arange(start, start + width))
            begin += length
        return torch.cat(found)

    def _own_rows(self, rows: PackedRows) -> int:
        """Rows, indices and biases. Rows to multiply by are kept as a weight of their shape is."""
        site, is_vector = self.site, self.site.kind in (SiteKind.NORM, SiteKind.VECTOR)
        by_rows = self._by_outputs or site.kind is SiteKind.EMBEDDING
        base_rows = site.in_features if site.kind is SiteKind.EMBEDDING else site.out_features
        count = rows.num_known + rows.num_added
        if by_rows:
            wanted = torch.arange(count) if rows.indices is None else rows.indices
            mine = int(torch.isin(wanted, self._mine).sum())
            count = mine + (int((wanted >= base_rows).sum()) if self.rank == 0 else 0)
        width = site.out_features if site.kind is SiteKind.EMBEDDING else site.in_features
        shape = (count,) if is_vector else (count, width if by_rows else self._inputs)
        if not count:
            return 0
        plain = rows.values is not None
        stored = prod(shape) * FLOAT_BYTES if plain else dense_weight(torch.zeros(shape)).nbytes
        indices = 0 if rows.indices is None else count * INDEX_BYTES
        has_bias = rows.bias is not None and (by_rows or self._leads)
        return stored + indices + (count * FLOAT_BYTES if has_bias else 0)


@pytest.mark.parametrize(
    ("base", "tied", "name"),
    CASES,
    ids=[f"{base}-{'tied' if tied else 'untied'}-{name}" for base, tied, name in CASES],
)
def test_each_rank_keeps_the_documented_bytes(worlds: Worlds, base: str, tied: bool, name: str) -> None:
    """Nothing that is cut is kept whole, and no rank keeps more than the one that the memory is counted by."""
    world = worlds[base, tied]
    sites = {site.name: site for site in world.here.model.sites()}
    with loaded(world.one, world.matrix, name):
        whole = kept_by(world.here)
        assert whole
        for size, ranked in world.several.items():
            with loaded(ranked.engine, world.matrix, name) as said:
                assert len(ranked.runners) == size
                totals = []
                for rank, runner in enumerate(ranked.runners):
                    kept = kept_by(runner)
                    shares = {site: Share(sites[site], rank, size).nbytes(of_all) for site, of_all in whole.items()}
                    assert {site: held_bytes(one) for site, one in kept.items()} == {
                        site: nbytes for site, nbytes in shares.items() if nbytes
                    }
                    totals.append(held_bytes(kept))
                assert max(totals) == said


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("tied", "name"), [(False, "lora-added-vocabulary"), (False, "lora-added-tokens"), (True, "lora-added-tokens")]
)
def test_added_tokens_are_the_first_rank_s_alone(worlds: Worlds, tied: bool, name: str, size: int) -> None:
    """Whether it has rows for these alone, or for all others, too."""
    world = worlds["llama", tied]
    ranked = world.several[size]
    with loaded(world.one, world.matrix, name):
        whole = {site: kept.rows for site, kept in kept_by(world.here).items() if kept.rows is not None}
        assert {site: rows.num_added for site, rows in whole.items()} == {
            "model.embed_tokens": WIDE_VOCAB - VOCAB_SIZE,
            "lm_head": WIDE_VOCAB - VOCAB_SIZE,
        }
        with loaded(ranked.engine, world.matrix, name):
            kept = [kept_by(runner) for runner in ranked.runners]
            for site, rows in whole.items():
                found = [one[site].rows if site in one else None for one in kept]
                assert [0 if one is None else one.num_added for one in found] == [rows.num_added, *[0] * (size - 1)]
                assert sum(0 if one is None else one.num_known for one in found) == rows.num_known


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ENDS)
def test_a_longer_matrix_without_indices_is_cut_alike(worlds: Worlds, name: str, size: int) -> None:
    """No kind of the matrix is lowered to one, but one that is installed may be."""
    sites = {site.name: site for site in worlds["llama", False].here.model.sites() if site.module == name}
    [site] = sites
    values = torch.randn(WIDE_VOCAB, 32)
    share = VOCAB_SIZE // size
    for rank in range(size):
        rows = cut({site: SiteDelta(rows=Rows(values))}, sites, rank, size)[site].rows
        assert rows is not None
        mine = values[rank * share : (rank + 1) * share]
        assert torch.equal(rows.values, torch.cat((mine, values[VOCAB_SIZE:])) if rank == 0 else mine)


def test_nothing_of_an_adapter_is_kept_beside_its_parts(worlds: Worlds) -> None:
    """With every kind loaded on two ranks, all tensors that this process has more than before are those parts: the
    lowered adapter that they were cut from is nobody's any more."""
    world = worlds["llama", False]
    engine, runners = world.several[2].engine, world.several[2].runners
    paths = {name: world.matrix.adapter(name) for name in world.matrix.names}
    before = live_bytes()
    for name, path in paths.items():
        engine.load_adapter(name, str(path))
    parts = sum(
        held_bytes([(ref.table, ref.rows.held) for ref in runner.model.tables().values()]) for runner in runners
    )
    assert parts > 100_000
    assert live_bytes() - before == pytest.approx(parts, rel=0.05)
    for name in paths:
        engine.unload_adapter(name)


def live_bytes() -> int:
    """Of the storages of all tensors of this process."""
    gc.collect()
    return held_bytes([found for found in gc.get_objects() if type(found) is torch.Tensor])
