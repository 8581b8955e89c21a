"""What an adapter's share of each table is: own rows beside low-rank parts, and one input scale for a packed layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.adapters.packed import PackedAdapter, pack_adapter
from loraplex.errors import InvalidAdapter, OverCapacity, UnsupportedFeature
from loraplex.layers.linear import Linear, LinearParts
from loraplex.layers.rows import Rows, RowsForm, RowsSite
from loraplex.layers.rows_memory import RowsMemory
from loraplex.layers.rows_table import RowsTable
from loraplex.models.base import TableRef
from loraplex.models.sites import Site, SiteKind
from loraplex.parallel.group import solo
from loraplex.parallel.shard import Shard
from loraplex.quant.dense import dense_weight
from loraplex.types import Coverage
from loraplex_kernels.lora.reference import ReferenceLora
from loraplex_kernels.segments import Term, plan_rows
from loraplex_kernels.testing import random_factors, random_scale, worst_excess

CPU = torch.device("cpu")
IN, OUT = 10, 6
GATE, UP = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
NORM = "model.norm"


class World:
    """A packed layer of two parts and a norm."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.lora = ReferenceLora()
        self.memory = RowsMemory(self.lora.slots, CPU)
        self.weights = {site: self.randn(OUT, IN).to(dtype) for site in (GATE, UP)}
        self.biases = {site: self.randn(OUT).to(dtype) for site in (GATE, UP)}
        self.table = self.lora.new_table(IN, (OUT, OUT), dtype=dtype, device=CPU, max_bytes=1 << 20)
        own = RowsSite(RowsForm.MULTIPLIED, OUT, IN, dtype, bias=True)
        self.rows = tuple(RowsTable(own, self.memory) for _ in range(2))
        norm = RowsTable(RowsSite(RowsForm.ELEMENTWISE, IN, 1, dtype), self.memory)
        self.refs = {site: TableRef(self.table, i, self.rows[i]) for i, site in enumerate((GATE, UP))}
        self.refs[NORM] = TableRef(None, 0, norm)
        self.base = BaseView(
            tuple(Site(site, SiteKind.LINEAR, IN, OUT, bias=True) for site in (GATE, UP)),
            dtype,
            self.weights.__getitem__,
            self.biases.get,
            tied=False,
            vocab_size=8,
        )

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def low_rank(self) -> LowRank:
        return LowRank(*random_factors(2, IN, OUT, self.generator), 0.5)

    def scale(self) -> torch.Tensor:
        return random_scale(IN, self.generator)

    def output(self, packed: PackedAdapter, x: torch.Tensor) -> torch.Tensor:
        """What the layer computes with the adapter in a slot."""
        for write in packed.writes:
            write.table.write(4, write.packed)
        weight, bias = torch.cat(tuple(self.weights.values())), torch.cat(tuple(self.biases.values()))
        layer = Linear((GATE, UP), LinearParts(dense_weight(weight), bias, self.table, self.rows), Shard.COLUMN, solo())
        return layer(x, self.lora.prepare(plan_rows([(len(x), (Term(4),))])))

    def expected(self, sites: dict[str, SiteDelta], x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for site in (GATE, UP):
            weight, bias = sites.get(site, SiteDelta()).merged(self.weights[site], self.biases[site])
            assert bias is not None
            outputs.append(x.double() @ weight.double().T + bias.double())
        return torch.cat(outputs, dim=1)


def adapter(sites: dict[str, SiteDelta]) -> AdapterDelta:
    return AdapterDelta("u", "test", sites, Coverage({}, {}))


def test_one_scale_of_all_parts_stays_the_tables() -> None:
    world = World()
    scale = world.scale()
    sites = {
        GATE: SiteDelta(in_scale=scale),
        UP: SiteDelta(world.low_rank(), in_scale=scale.clone()),
        NORM: SiteDelta(rows=Rows(torch.ones(IN))),
    }
    packed = pack_adapter(adapter(sites), world.refs, world.base)
    assert {type(write.table).__name__ for write in packed.writes} == {"ReferenceTable", "RowsTable"}
    assert len(packed.writes) == 2
    assert packed.facts.exclusive == {}
    x = world.randn(3, IN)
    assert worst_excess(world.output(packed, x), world.expected(sites, x), torch.float32) <= 1


CASES = ("one part", "each its own", "beside rows", "beside a whole module", "beside nothing of the other's")


def differing(world: World, case: str) -> dict[str, SiteDelta]:
    scaled = SiteDelta(world.low_rank(), in_scale=world.scale(), out_scale=random_scale(OUT, world.generator))
    if case == "one part":
        return {UP: scaled}
    if case == "each its own":
        return {UP: scaled, GATE: SiteDelta(in_scale=world.scale(), shift=world.randn(OUT))}
    if case == "beside rows":
        rows = Rows(world.randn(2, IN), torch.tensor([1, 4]), world.randn(2))
        return {UP: replace(scaled, rows=rows, exclusive="trained rows"), GATE: SiteDelta(world.low_rank())}
    if case == "beside a whole module":
        return {UP: scaled, GATE: SiteDelta(rows=Rows(world.randn(OUT, IN), None, world.randn(OUT)))}
    return {UP: SiteDelta(in_scale=world.scale())}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_that_scale_their_inputs_differently_get_rows(case: str, dtype: torch.dtype) -> None:
    world = World(dtype)
    sites = differing(world, case)
    packed = pack_adapter(adapter(sites), world.refs, world.base)
    x = world.randn(3, IN).to(dtype)
    assert worst_excess(world.output(packed, x), world.expected(sites, x), dtype) <= 1
    assert set(packed.facts.exclusive) == {site for site, delta in sites.items() if delta.in_scale is not None}
    expected = "trained rows" if case == "beside rows" else "an input scale for one part of a packed layer"
    assert packed.facts.exclusive[UP] == expected
    assert packed.footprint.nbytes == packed.facts.nbytes == sum(write.packed.nbytes for write in packed.writes)


def test_without_the_base_they_are_refused() -> None:
    world = World()
    with pytest.raises(UnsupportedFeature, match=r"up_proj': an input scale that other parts"):
        pack_adapter(adapter({UP: SiteDelta(in_scale=world.scale())}), world.refs)


def test_rows_that_take_more_than_an_adapter_may_are_refused_before_they_are_made() -> None:
    """A file of a few numbers would become as large as the layers it scales."""
    world = World()
    scaled = adapter({UP: SiteDelta(in_scale=world.scale())})
    nbytes = IN * OUT * 4
    pack_adapter(scaled, world.refs, world.base, max_bytes=nbytes)
    with pytest.raises(OverCapacity, match=f"of {nbytes} bytes; at most {nbytes - 1} are allowed"):
        pack_adapter(scaled, world.refs, replace(world.base, weight=_unasked), max_bytes=nbytes - 1)


def _unasked(name: str) -> torch.Tensor:
    raise AssertionError(f"the weight of {name} was read")


def test_equal_rows_of_two_adapters_are_one_write_of_one_key() -> None:
    world = World()
    rows = Rows(world.randn(OUT, IN), None, world.randn(OUT))
    first, second = (
        pack_adapter(
            adapter({GATE: SiteDelta(rows=Rows(rows.values.clone(), None, rows.bias), low_rank=low)}), world.refs
        )
        for low in (None, world.low_rank())
    )
    assert first.writes[0].packed is second.writes[0].packed
    assert first.writes[0].key == second.writes[0].key != ""
    assert [write.key for write in second.writes[1:]] == [""]


def test_rows_that_do_not_fit_are_named_by_site() -> None:
    world = World()
    with pytest.raises(InvalidAdapter, match=r"adapter u: 'model.norm': own rows are \[3\], must be all of \[10\]"):
        pack_adapter(adapter({NORM: SiteDelta(rows=Rows(torch.ones(3)))}), world.refs)
