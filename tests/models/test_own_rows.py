"""Linears and norms with adapters' own rows, mixed in one step with everything else a slot may change, against dense
float64."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from loraplex.layers.linear import Linear, LinearParts
from loraplex.layers.norm import HeadNorm, RMSNorm
from loraplex.layers.rows import Rows, RowsForm
from loraplex.parallel.group import solo
from loraplex.parallel.shard import Shard
from loraplex.quant.base import Weight
from loraplex.quant.dense import dense_weight
from loraplex_kernels.backend import choose_lora
from loraplex_kernels.lora import LoraBackend, LoraTable
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows
from loraplex_kernels.testing import expected_input, expected_output, worst_excess
from tests.fakes_rows import CPU, PLANS, WORLDS, World

HIDDEN = 24
PARTS = (12, 8, 8)
EPS = 1e-5


@pytest.fixture(params=["cpu", "reference"])
def lora(request: pytest.FixtureRequest) -> LoraBackend:
    return choose_lora(request.param, CPU)


@pytest.fixture(params=WORLDS, ids=str)
def world(request: pytest.FixtureRequest) -> World:
    name, dtype = request.param
    return World(choose_lora(name, CPU), dtype)


def dense(
    weight: torch.Tensor, bias: torch.Tensor | None, rows: Rows | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A matrix with own rows in it, in float64."""
    weight, bias = weight.double().clone(), None if bias is None else bias.double().clone()
    if rows is not None:
        where = slice(None) if rows.indices is None else rows.indices
        weight[where] = rows.values.double()
        if bias is not None:
            assert rows.bias is not None
            bias[where] = rows.bias.double()
    return weight, bias


@dataclass
class PackedLayer:
    """Three parts with biases; slots 0 and 2 have low-rank changes as well, slot 4 low-rank changes alone elsewhere."""

    world: World

    def __post_init__(self) -> None:
        world = self.world
        self.weight, self.bias = world.randn(sum(PARTS), HIDDEN), world.randn(sum(PARTS))
        self.table = world.lora.new_table(HIDDEN, PARTS, dtype=world.dtype, device=CPU, max_bytes=1 << 20)
        self.slots = {0: world.delta(HIDDEN, PARTS), 2: world.delta(HIDDEN, PARTS)}
        whole = [Rows(world.randn(size, HIDDEN), None, world.randn(size)) for size in PARTS]
        some = torch.tensor([0, 3, 7])
        self.rows: dict[int, dict[int, Rows]] = {
            1: {1: whole[1]},
            2: {
                0: Rows(world.randn(3, HIDDEN), some, world.randn(3)),
                2: Rows(world.randn(1, HIDDEN), torch.tensor([5]), world.randn(1)),
            },
            3: dict(enumerate(whole)),
            4: {2: whole[2]},
            5: dict(enumerate(whole)),  # the same again
        }
        self.tables = tuple(world.rows_table(RowsForm.MULTIPLIED, size, HIDDEN, bias=True) for size in PARTS)
        self.fill()

    def fill(self) -> None:
        for slot, delta in self.slots.items():
            self.table.write(slot, self.table.pack(delta))
        for slot, parts in self.rows.items():
            for part, rows in parts.items():
                self.tables[part].write(slot, self.tables[part].pack(rows))

    def layer(self, weight: Weight | None = None) -> Linear:
        parts = LinearParts(weight or dense_weight(self.weight), self.bias, self.table, self.tables)
        return Linear(("q_proj", "k_proj", "v_proj"), parts, Shard.COLUMN, solo())

    def expected(self, x: torch.Tensor, plan: SegmentPlan) -> torch.Tensor:
        scaled = expected_input(x, plan, self.slots)
        base = scaled @ self.weight.double().T + self.bias.double()
        for segment in plan.segments:
            rows = slice(segment.start, segment.stop)
            for term in segment.terms:
                for part, own in self.rows.get(term.slot, {}).items():
                    columns = slice(sum(PARTS[:part]), sum(PARTS[: part + 1]))
                    weight, bias = dense(self.weight[columns], self.bias[columns], own)
                    base[rows, columns] = scaled[rows] @ weight.T + bias
        return expected_output(base, x, plan, self.slots, PARTS)


@pytest.mark.parametrize("name", PLANS)
def test_a_packed_layer_is_the_dense_formula(name: str, world: World) -> None:
    packed, plan = PackedLayer(world), PLANS[name]
    x = world.randn(plan.num_rows, HIDDEN)
    given = x.clone()
    got = packed.layer()(given, world.lora.prepare(plan))
    assert got.shape == (plan.num_rows, sum(PARTS))
    assert worst_excess(got, packed.expected(x, plan), world.dtype) <= 1
    assert torch.equal(given, x)


def test_a_segments_values_stay_its_own(world: World) -> None:
    """NaN in one segment's inputs; and rows without own rows have the bits of a step in which nobody has any."""
    packed, plan = PackedLayer(world), PLANS["mixed"]
    layer = packed.layer()
    x = world.randn(plan.num_rows, HIDDEN)
    clean = layer(x, world.lora.prepare(plan))
    for segment in plan.segments:
        poisoned = x.clone()
        poisoned[segment.start : segment.stop] = float("nan")
        got = layer(poisoned, world.lora.prepare(plan))
        others = torch.ones(plan.num_rows, dtype=torch.bool)
        others[segment.start : segment.stop] = False
        assert torch.equal(got[others], clean[others])
        assert got[~others].isnan().all()
    for slot in packed.rows:
        for table in packed.tables:
            table.clear(slot)
    plain = layer(x, world.lora.prepare(plan_rows([(2, (Term(0),)), (plan.num_rows - 2, ())])))
    assert torch.equal(plain[:3], clean[:3])
    assert torch.equal(plain[-2:], clean[-2:])


class CountedWeight:
    """Counts the products of the base."""

    def __init__(self, weight: Weight) -> None:
        self._weight = weight
        self.shape, self.nbytes, self.calls = weight.shape, weight.nbytes, 0

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.calls += 1
        return self._weight.matmul(x, bias)

    def join(self, table: LoraTable) -> None:
        del table

    def dequantize(self) -> torch.Tensor:
        return self._weight.dequantize()


def test_the_base_is_multiplied_only_where_something_of_it_is_left(lora: LoraBackend) -> None:
    packed = PackedLayer(World(lora, torch.float32))
    calls = {}
    for name, plan in PLANS.items():
        weight = CountedWeight(dense_weight(packed.weight))
        packed.layer(weight)(torch.randn(plan.num_rows, HIDDEN), lora.prepare(plan))
        calls[name] = weight.calls
    assert calls == {name: int(name != "all replaced") for name in PLANS}


def test_slots_are_replaced_and_forgotten(lora: LoraBackend) -> None:
    """What a plan meant a moment ago is not what it means now, though plans are kept."""
    packed = PackedLayer(World(lora, torch.float32))
    layer, plan = packed.layer(), plan_rows([(2, (Term(1),)), (1, (Term(0),))])
    x = torch.randn(3, HIDDEN)

    def check() -> torch.Tensor:
        got = layer(x, lora.prepare(plan))
        assert worst_excess(got, packed.expected(x, plan), torch.float32) <= 1
        return got

    first = check()
    packed.rows[1] = {1: Rows(torch.randn(PARTS[1], HIDDEN), None, torch.randn(PARTS[1]))}
    packed.fill()
    assert not torch.equal(check(), first)
    packed.rows[1] = {}
    packed.slots[1] = packed.world.delta(HIDDEN, PARTS)  # else the slot would hold nothing anywhere
    packed.fill()
    packed.tables[1].clear(1)
    check()
    packed.tables[1].clear(1)  # a no-op
    packed.rows[0] = {2: Rows(torch.randn(PARTS[2], HIDDEN), None, torch.randn(PARTS[2]))}  # it had none at all
    packed.tables[2].write(0, packed.tables[2].pack(packed.rows[0][2]))
    check()


# ---- norms ----


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


@pytest.mark.parametrize("name", PLANS)
def test_a_norm_has_the_weight_of_each_rows_adapter(name: str, world: World) -> None:
    plan = PLANS[name]
    weights = {slot: world.randn(HIDDEN) for slot in (1, 2, 3, 5)}
    base, table = world.randn(HIDDEN), world.rows_table(RowsForm.ELEMENTWISE, HIDDEN, 1)
    for slot, weight in weights.items():
        table.write(slot, table.pack(Rows(weight)))
    x = world.randn(plan.num_rows, HIDDEN)
    expected = rms(x, base)
    for segment in plan.segments:
        for term in segment.terms:
            if term.slot in weights:
                rows = slice(segment.start, segment.stop)
                expected[rows] = rms(x[rows], weights[term.slot])
    world.hold_somewhere()
    got = RMSNorm("norm", base, EPS, table)(x, world.lora.prepare(plan))
    assert worst_excess(got, expected, world.dtype) <= 1


#: neighbours with few rows and with many, equal weights beside each other, base rows between
NEIGHBOURS = plan_rows(
    [(1, (Term(slot),)) for slot in (1, 2, 3, 5, 0)] + [(2, ()), (1, (Term(2),)), (7, (Term(1),)), (2, (Term(3),))]
)


@pytest.mark.parametrize("poison", [False, True], ids=["finite", "poisoned"])
def test_a_norms_rows_have_the_bits_that_they_get_alone(poison: bool, world: World) -> None:
    """Whatever stands beside them, not a number included."""
    weights = {slot: world.randn(HIDDEN) for slot in (1, 2, 3)} | {5: world.randn(HIDDEN)}
    base, table = world.randn(HIDDEN), world.rows_table(RowsForm.ELEMENTWISE, HIDDEN, 1)
    for slot, weight in weights.items():
        table.write(slot, table.pack(Rows(weight)))
    world.hold_somewhere()
    norm, x = RMSNorm("norm", base, EPS, table), world.randn(NEIGHBOURS.num_rows, HIDDEN) * 30
    alone = functional.rms_norm(x, (HIDDEN,), base, EPS)
    for segment in NEIGHBOURS.segments:
        rows = slice(segment.start, segment.stop)
        alone[rows] = norm(x[rows], world.lora.prepare(plan_rows([(segment.stop - segment.start, segment.terms)])))
    for poisoned in range(NEIGHBOURS.num_rows) if poison else ():
        given = x.clone()
        given[poisoned] = float("nan")
        got = norm(given, world.lora.prepare(NEIGHBOURS))
        assert got[poisoned].isnan().all()
        got[poisoned] = alone[poisoned]
        assert torch.equal(got, alone)
    assert torch.equal(norm(x, world.lora.prepare(NEIGHBOURS)), alone)


def test_a_norm_keeps_nothing_of_an_adapter_that_left(world: World) -> None:
    table = world.rows_table(RowsForm.ELEMENTWISE, HIDDEN, 1)
    for slot in (1, 2):
        table.write(slot, table.pack(Rows(world.randn(HIDDEN))))
    held = weakref.ref(table.held[1])
    world.hold_somewhere()
    norm = RMSNorm("norm", world.randn(HIDDEN), EPS, table)
    norm(world.randn(2, HIDDEN), world.lora.prepare(plan_rows([(1, (Term(1),)), (1, (Term(2),))])))
    norm(world.randn(1, HIDDEN), world.lora.prepare(plan_rows([(1, (Term(1),))])))
    table.clear(1)
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("name", PLANS)
def test_head_norms_are_replaced_apart(name: str, world: World) -> None:
    plan, heads, size = PLANS[name], (3, 2), 8
    weights = {
        (0, 1): world.randn(size),
        (1, 1): world.randn(size),
        (1, 2): world.randn(size),
        (0, 3): world.randn(size),
    }
    bases = world.randn(size), world.randn(size)
    tables = [world.rows_table(RowsForm.ELEMENTWISE, size, 1) for _ in range(2)]
    for (part, slot), weight in weights.items():
        tables[part].write(slot, tables[part].pack(Rows(weight)))
    q, k = (RMSNorm(name, base, EPS, table) for name, base, table in zip(("q", "k"), bases, tables, strict=True))
    x = world.randn(plan.num_rows, sum(heads), size)
    expected = torch.cat((rms(x[:, : heads[0]], bases[0]), rms(x[:, heads[0] :], bases[1])), dim=1)
    for segment in plan.segments:
        rows = slice(segment.start, segment.stop)
        for term in segment.terms:
            for part, where in enumerate((slice(0, heads[0]), slice(heads[0], None))):
                if (part, term.slot) in weights:
                    expected[rows, where] = rms(x[rows, where], weights[part, term.slot])
    world.hold_somewhere()
    got = HeadNorm(q, k, heads, EPS)(x, world.lora.prepare(plan))
    assert worst_excess(got, expected, world.dtype) <= 1
